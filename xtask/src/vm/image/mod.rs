//! The guest's file system: an initramfs with the test binaries, the libraries they are linked to, modules and a few tools.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{console, kernel::Kernel};
use crate::{test::cargo, workspace};

/// Modules that tests need. They are loaded before the tests, in this order, with what they depend on.
const MODULES: [&str; 5] = ["veth", "bridge", "sch_ingress", "cls_bpf", "tun"];

/// Tools of the host that the guest gets, with their libraries. busybox's `ip` makes no veth.
const TOOLS: [&str; 2] = ["ip", "ethtool"];

/// Where the guest has the BPF object, for tests that read it rather than embed it; WEIR_BPF_OBJECT says so to them.
const OBJECT: &str = "tests/weir-ebpf.o";

/// Makes the initramfs and returns its path.
pub fn pack(kernel: &Kernel, binaries: &[(&str, PathBuf)], filter: Option<&str>) -> Result<PathBuf> {
    let work = workspace::target()
        .join("vm")
        .join(format!("guest-{}", kernel.release));
    workspace::remove_folder(&work)?;
    let root = work.join("root");
    for dir in [
        "bin",
        "dev",
        "lib/modules",
        "proc",
        "root",
        "run",
        "sys",
        "tests",
        "tmp",
    ] {
        fs::create_dir_all(root.join(dir)).with_context(|| format!("cannot make {dir} of the guest"))?;
    }
    symlink("bin", root.join("sbin"))?;
    add_programs(&root, binaries)?;
    copy(&workspace::bpf_object(), &root.join(OBJECT))?;
    let modules = add_modules(&root, kernel)?;
    let names: Vec<&str> = binaries.iter().map(|(name, _)| *name).collect();
    write_executable(&root.join("init"), init(&modules, &names, filter).as_bytes())?;
    let image = work.join("initramfs.gz");
    archive(&root, &image)?;
    Ok(image)
}

fn add_programs(root: &Path, binaries: &[(&str, PathBuf)]) -> Result<()> {
    let busybox = program("busybox")?;
    copy(&busybox, &root.join("bin/busybox"))?;
    add_libraries(root, &busybox)?;
    // The shell is not busybox: its own would run its own `ip` whatever PATH says.
    copy(&program("dash")?, &root.join("bin/sh"))?;
    add_libraries(root, &program("dash")?)?;
    for tool in TOOLS {
        let path = program(tool)?;
        copy(&path, &root.join("bin").join(tool))?;
        add_libraries(root, &path)?;
    }
    for (name, path) in binaries {
        copy(path, &root.join("tests").join(name))?;
        add_libraries(root, path)?;
    }
    Ok(())
}

/// Copies what `binary` is linked to, to the same paths. A static one is linked to nothing, which is an error for ldd.
fn add_libraries(root: &Path, binary: &Path) -> Result<()> {
    let output = Command::new("ldd")
        .env("LC_ALL", "C")
        .arg(binary)
        .output()
        .context("cannot start ldd")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && !errors.contains("not a dynamic executable") {
        bail!("ldd {} failed: {}", binary.display(), errors.trim());
    }
    for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
        let target = root.join(library.strip_prefix("/").unwrap_or(library));
        if !target.exists() {
            copy(library, &target)?;
        }
    }
    Ok(())
}

/// The paths in the output of `ldd`.
fn libraries(ldd: &str) -> BTreeSet<&Path> {
    ldd.lines()
        .filter_map(|line| {
            let path = line.split_once("=> ").map_or(line, |(_, path)| path);
            let path = Path::new(path.split_whitespace().next()?);
            path.is_absolute().then_some(path)
        })
        .collect()
}

/// Unpacks [`MODULES`] and what they depend on into the guest and returns their file names in the order of loading.
fn add_modules(root: &Path, kernel: &Kernel) -> Result<Vec<String>> {
    let listing = kernel.modules().join("modules.dep");
    let dependencies =
        fs::read_to_string(&listing).with_context(|| format!("cannot read {}", listing.display()))?;
    let builtin = fs::read_to_string(kernel.modules().join("modules.builtin")).unwrap_or_default();
    let mut loaded = Vec::new();
    for module in MODULES {
        if module_line(&builtin, module).is_some() {
            continue;
        }
        for path in load_order(&dependencies, module)? {
            let (name, bytes) = unpack_module(&kernel.modules().join(path))?;
            if !loaded.contains(&name) {
                fs::write(root.join("lib/modules").join(&name), bytes)?;
                loaded.push(name);
            }
        }
    }
    Ok(loaded)
}

/// The line of `listing` (paths, one a line, perhaps followed by a colon) that is about `module`.
fn module_line<'a>(listing: &'a str, module: &str) -> Option<&'a str> {
    listing.lines().find(|line| {
        let path = line.split(':').next().unwrap_or(line);
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split_once(".ko").is_some_and(|(name, _)| name == module)
    })
}

/// The paths of `module` and all it depends on, those that others need first. `modules.dep` lists dependencies such that
/// the last has to be loaded first.
fn load_order<'a>(dependencies: &'a str, module: &str) -> Result<Vec<&'a str>> {
    let line = module_line(dependencies, module)
        .with_context(|| format!("the kernel has no module {module}, which the tests need"))?;
    let (own, others) = line
        .split_once(':')
        .context("a line of modules.dep has no colon")?;
    Ok(others.split_whitespace().rev().chain([own]).collect())
}

/// A module's file name without compression, and its contents. The kernel's own loader knows no xz.
fn unpack_module(path: &Path) -> Result<(String, Vec<u8>)> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .context("a module has no name")?;
    let Some(plain) = name.strip_suffix(".xz") else {
        return Ok((
            name.into(),
            fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
        ));
    };
    let output = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .output()
        .context("cannot start xz")?;
    if !output.status.success() {
        bail!("xz cannot unpack {}: {}", path.display(), output.status);
    }
    Ok((plain.into(), output.stdout))
}

/// The guest's first process. It says what it does in the words of `console`, and powers off whatever happens.
fn init(modules: &[String], binaries: &[&str], filter: Option<&str>) -> String {
    let mut script = String::from(
        "#!/bin/sh\n\
         export PATH=/bin HOME=/root RUST_BACKTRACE=1\n\
         /bin/busybox --install -s /bin 2>/dev/null\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmp /tmp; mount -t tmpfs run /run\n\
         mount -t bpf bpf /sys/fs/bpf; mount -t cgroup2 cgroup /sys/fs/cgroup\n\
         ulimit -l unlimited\n",
    );
    script += &format!("export WEIR_BPF_OBJECT=/{OBJECT}\n");
    for module in modules {
        script += &format!(
            "insmod /lib/modules/{module} || echo '{} {module}'\n",
            console::MODULE_FAILED
        );
    }
    script += "ip link set lo up\n";
    // What tests say also when they pass is how long the verifier took.
    let arguments = cargo::harness_arguments(Some(1), filter).join(" ") + " --show-output";
    for binary in binaries {
        script += &format!(
            "echo '{} {binary}'\n/tests/{binary} {arguments}\necho \"{} {binary} $?\"\n",
            console::START,
            console::END
        );
    }
    script + "poweroff -f\n"
}

fn archive(root: &Path, image: &Path) -> Result<()> {
    let mut cpio = Command::new("sh")
        .args(["-c", "cpio --quiet -o -H newc | gzip -1 > \"$0\""])
        .arg(image)
        .current_dir(root)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start cpio")?;
    let mut names = String::new();
    list(root, root, &mut names)?;
    cpio.stdin
        .take()
        .context("cpio has an input")?
        .write_all(names.as_bytes())?;
    let status = cpio.wait()?;
    if !status.success() {
        bail!("packing {} failed: {status}", image.display());
    }
    Ok(())
}

/// Names everything below `dir`, folders before what is in them, relative to `root`.
fn list(root: &Path, dir: &Path, names: &mut String) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let name = path
            .strip_prefix(root)?
            .to_str()
            .context("a file's name is no text")?;
        names.push_str(name);
        names.push('\n');
        if entry.file_type()?.is_dir() {
            list(root, &path, names)?;
        }
    }
    Ok(())
}

fn program(name: &str) -> Result<PathBuf> {
    workspace::find_program(name).with_context(|| format!("{name} is missing: run `cargo xtask setup vm`"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn write_executable(path: &Path, contents: &[u8]) -> Result<()> {
    fs::write(path, contents)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

#[cfg(test)]
mod tests;
