"""Pictures and prompts -> numbers. Knows neither methods nor the model that drew the pictures."""
