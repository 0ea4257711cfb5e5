"""The specification of every op, in readable torch. Takes float64; imports no kernel."""
