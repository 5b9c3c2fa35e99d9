"""The sliders: adapters' scales in a person's hands, and the picture that follows them."""
