"""Time operations and whole models in paired runs beside dense attention (`bench kernels|decode|prefill|engine|guard`)."""
