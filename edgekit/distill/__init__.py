"""A transformer into a recurrent model: transfer of attention outputs, then low-rank tuning."""
