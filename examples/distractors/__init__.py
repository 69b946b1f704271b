"""Where attention must choose: few far places that matter among many distractors."""
