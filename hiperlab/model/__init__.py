"""The frozen Stable Diffusion stack. It never knows a method."""
