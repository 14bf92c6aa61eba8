"""Problems, prompts as token ids, their order, graders, and the embedded task."""
