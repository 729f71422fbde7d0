"""Is a bundle still the same model? Measured hop by hop against its checkpoint in float32."""
