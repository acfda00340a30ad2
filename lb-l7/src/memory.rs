//! Memory that nobody needs goes back to the system.

/// Has the system give pages of the usual size only. A huge one (2 MiB) for each of the allocator's corners is more than all
/// that a small shim needs, and brings nothing that can be measured. Early: what has been given stays.
pub fn small_pages() {
    // On a kernel that knows no huge pages there is nothing to refuse.
    let _refused = nix::sys::prctl::set_thp_disable(true);
}

/// Gives back what this thread has freed. The allocator does so by itself only while it is asked for more.
pub fn give_back() {
    // SAFETY: may be called at any time; it looks at this thread's own heap alone.
    unsafe { libmimalloc_sys::mi_collect(true) }
}
