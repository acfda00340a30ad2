use super::*;

const DEP: &str = "kernel/drivers/net/veth.ko.xz:\n\
    kernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz kernel/net/llc/llc.ko.xz\n\
    kernel/net/bridge/br_netfilter.ko.xz: kernel/net/bridge/bridge.ko.xz\n";

#[test]
fn a_module_comes_after_what_it_depends_on() {
    assert_eq!(
        load_order(DEP, "bridge").unwrap(),
        [
            "kernel/net/llc/llc.ko.xz",
            "kernel/net/802/stp.ko.xz",
            "kernel/net/bridge/bridge.ko.xz"
        ]
    );
    assert_eq!(
        load_order(DEP, "veth").unwrap(),
        ["kernel/drivers/net/veth.ko.xz"]
    );
}

#[test]
fn a_missing_module_is_named() {
    let error = load_order(DEP, "tun").unwrap_err();
    assert!(error.to_string().contains("no module tun"), "{error}");
}

#[test]
fn libraries_are_the_absolute_paths() {
    let ldd = "\tlinux-vdso.so.1 (0x00007f96)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f96)\n\
        \t/lib64/ld-linux-x86-64.so.2 (0x00007f96)\n";
    let found: Vec<_> = libraries(ldd).into_iter().collect();
    assert_eq!(
        found,
        [
            Path::new("/lib/x86_64-linux-gnu/libc.so.6"),
            Path::new("/lib64/ld-linux-x86-64.so.2")
        ]
    );
    assert!(libraries("\tstatically linked\n").is_empty());
}

#[test]
fn the_guest_runs_every_binary_and_powers_off_last() {
    let script = init(&["veth.ko".into()], &["prog", "vm"], Some("tcp"));
    let at = |what: &str| {
        script
            .find(what)
            .unwrap_or_else(|| panic!("no `{what}` in {script}"))
    };
    assert!(at("insmod /lib/modules/veth.ko") < at("/tests/prog --test-threads=1 tcp"));
    assert!(at("/tests/prog") < at("/tests/vm"));
    assert!(at("/tests/vm") < at("poweroff"));
}
