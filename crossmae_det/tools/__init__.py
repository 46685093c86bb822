"""The commands of ``crossmae-det``; ``crossmae_det.__main__`` lists and starts them."""
