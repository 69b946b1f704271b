"""What thresholds that learn gain in denoising, on photographs that nobody has learned from.

`attention.py`: non-local means as attention, and what of it is learned. `network.py`: a small network with an attention
block. `methods.py`: what is compared. `study.py`: training and testing. `report.py`: tables and plots. `python -m
examples.denoising` runs it all.
"""
