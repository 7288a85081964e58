"""What methods are made of: the contract, editing and path-following methods, class pictures, kept concepts."""
