//! What crosses the kernel boundary: one definition, two compilers.
//!
//! Everything here is compiled for the kernel programs (`lb-ebpf`) and for the agent (`lb-userspace`).
//! A change of any layout in [`maps`] must raise [`maps::ABI_VERSION`].

#![cfg_attr(not(any(test, feature = "user")), no_std)]
#![deny(missing_docs)]

pub mod addr;
pub mod adoption;
pub mod counter;
pub mod flow;
pub mod limits;
pub mod maps;
pub mod slot;
