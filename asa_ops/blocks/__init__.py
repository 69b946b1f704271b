"""The seven blocks that plain PyTorch computes well: formulas, function and reference of each in one file."""
