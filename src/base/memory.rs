//! How much memory there is for the servers that this process starts.

use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// Memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: u64,
    /// What a new process can get without swapping.
    pub available_bytes: u64,
}

/// The memory of this machine, or of the control group that this process is in if that may have less: what this process
/// starts is in the same group (systemd.resource-control(5), `MemoryMax=`). Nothing if the system does not say.
pub fn memory() -> Option<Memory> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let machine = Memory { total_bytes: system.total_memory(), available_bytes: system.available_memory() };
    let own = Pid::from_u32(std::process::id());
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[own]), false, ProcessRefreshKind::nothing());
    let limits = system.process(own).and_then(|process| process.cgroup_limits());
    let group = limits.map(|limits| Memory { total_bytes: limits.total_memory, available_bytes: limits.free_memory });
    (machine.total_bytes > 0).then(|| smaller(machine, group))
}

fn smaller(machine: Memory, group: Option<Memory>) -> Memory {
    match group {
        Some(group) if group.total_bytes > 0 && group.total_bytes < machine.total_bytes => Memory {
            total_bytes: group.total_bytes,
            available_bytes: group.available_bytes.min(machine.available_bytes),
        },
        _ => machine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory_and_some_of_it_is_available() {
        let memory = memory().unwrap();
        assert!(memory.total_bytes > 64 << 20, "{memory:?}");
        assert!(memory.available_bytes > 0 && memory.available_bytes <= memory.total_bytes, "{memory:?}");
    }

    #[test]
    fn a_control_group_counts_only_where_it_allows_less_than_the_machine_has() {
        let machine = Memory { total_bytes: 1000, available_bytes: 600 };
        let tight = Memory { total_bytes: 800, available_bytes: 700 };
        assert_eq!(smaller(machine, None), machine);
        assert_eq!(smaller(machine, Some(tight)), Memory { total_bytes: 800, available_bytes: 600 });
        assert_eq!(smaller(machine, Some(Memory { total_bytes: 2000, available_bytes: 1 })), machine);
        assert_eq!(smaller(machine, Some(Memory { total_bytes: 0, available_bytes: 0 })), machine);
    }
}
