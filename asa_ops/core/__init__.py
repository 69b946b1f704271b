"""What the ops share: dispatch, checks, layout, extension, torch's contracts. It imports nothing else of asa_ops."""
