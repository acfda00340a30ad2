//! Weir's packet core: parse → lookup → rewrite → verdict, pure and generic over packet and tables.
#![cfg_attr(not(test), no_std)]
