"""The mistakes that spoil a run, found before its first step."""
