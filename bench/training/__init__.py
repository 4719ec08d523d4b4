"""What a training step costs that multiplies by sparse kernels, beside dense steps."""
