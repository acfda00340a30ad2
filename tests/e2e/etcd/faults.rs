//! etcd fails; nothing else does.
