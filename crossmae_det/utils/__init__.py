"""What every task shares below its own package: reading images, warnings of libraries."""
