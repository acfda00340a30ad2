//! Memory that nobody needs goes back to the system.

/// Gives back what this thread has freed. The allocator does so by itself only while it is asked for more.
pub fn give_back() {
    // SAFETY: may be called at any time; it looks at this thread's own heap alone.
    unsafe { libmimalloc_sys::mi_collect(true) }
}
