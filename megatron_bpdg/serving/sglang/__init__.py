"""What is SGLang's own (0.5.23 and newer): starting it, what it answers, and how it takes weights."""
