"""How a run is judged while it trains, on pictures that do not train. It knows no framework."""
