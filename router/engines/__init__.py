"""Engines and daemons, as the router hears of them and speaks to them."""
