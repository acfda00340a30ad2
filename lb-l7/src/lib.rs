//! Weir's L7 shim.
