//! Weir's packet core: parse → lookup → rewrite → verdict.
//!
//! Pure: generic over the packet ([`packet::Packet`]: XDP, TC, or a buffer of the tests) and over the maps
//! ([`tables::Tables`]), so that the same code runs in the kernel and under `cargo test`.
//!
//! Functions are kept out of line where the verifier would otherwise walk the same code for v4 × v6 × TCP × UDP ×
//! ICMP; such a function takes at most five words and returns one (the BPF calling convention).

#![cfg_attr(not(test), no_std)]

pub mod create;
pub mod csum;
pub mod earlier;
pub mod error;
pub mod flows;
pub mod forward;
pub mod fragment;
pub mod headers;
pub mod icmp;
pub mod ingress;
pub mod install;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod rate;
pub mod reply;
pub mod reverse;
pub mod send;
pub mod stats;
pub mod table;
pub mod tables;
pub mod tcp;
pub mod template;
pub mod unused;
pub mod verdict;
