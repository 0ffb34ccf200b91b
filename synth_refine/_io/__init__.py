"""What all stages share: reading what users give, writing whole files, errors, Ray."""
