"""Personalisation methods: one file each, none knows another. Only yaml names them."""
