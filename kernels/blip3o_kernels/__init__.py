"""Device code of blip3o_fast: Triton kernels and their launchers. Imports torch and triton only."""
