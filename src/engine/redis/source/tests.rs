//! What is read out of INFO and of log files that are torn, cut, or written by a clock that goes back.

use super::*;

fn info(lines: &[(&str, &str)]) -> BTreeMap<String, String> {
    lines.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

#[test]
fn only_a_server_that_changed_nothing_about_its_log_proves_that_the_log_is_whole() {
    let base = [("run_id", "a"), ("role", "master"), ("aof_enabled", "1"), ("total_commands_processed", "5")];
    let earlier = Fingerprint::of(&info(&base));
    let later = |key, value| Fingerprint::of(&info(&[&base[..], &[(key, value)]].concat()));
    assert!(earlier.proves(&later("total_commands_processed", "9")));
    assert!(earlier.proves(&later("cmdstat_get", "calls=9,usec=3")));
    assert!(!earlier.proves(&later("cmdstat_config|set", "calls=2,usec=3")));
    assert!(!earlier.proves(&later("run_id", "b")));
    assert!(!earlier.proves(&later("role", "slave")));
    assert!(!earlier.proves(&later("total_commands_processed", "4")));
    assert!(!later("aof_enabled", "0").proves(&later("aof_enabled", "0")));
    assert!(!Fingerprint::default().proves(&Fingerprint::default()));
    assert_eq!(
        Fingerprint::parse(&later("cmdstat_config|set", "calls=2,usec=3").render()).values["cmdstat_config|set"],
        "calls=2"
    );
    assert_eq!(Fingerprint::parse(&earlier.render()), earlier);
}

#[test]
fn a_file_is_readable_up_to_its_last_whole_transaction_and_further_when_that_grew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let (whole, open) = ("*1\r\n$4\r\nPING\r\n", "*1\r\n$5\r\nMULTI\r\n*1\r\n$4\r\nPI");
    let mut walk = Walk::default();
    std::fs::write(&path, format!("{whole}{open}")).unwrap();
    walk_on(&path, &mut walk).unwrap();
    assert_eq!(walk.command_end, whole.len() as u64);
    // After a crash the server cuts the torn end off and writes something else there.
    std::fs::write(&path, format!("{whole}{whole}")).unwrap();
    walk_on(&path, &mut walk).unwrap();
    assert_eq!(walk.command_end, 2 * whole.len() as u64);
    std::fs::write(&path, whole).unwrap();
    assert_eq!(walk_on(&path, &mut walk).unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn an_annotation_whose_command_is_torn_is_not_shipped_before_another_file_follows() {
    let dir = tempfile::tempdir().unwrap();
    let (command, second, torn) = ("*1\r\n$4\r\nPING\r\n", "#TS:100\r\n", "*1\r\n$4\r\nPI");
    let held = |number: u64, content: &str| {
        let path = dir.path().join(number.to_string());
        std::fs::write(&path, content).unwrap();
        HeldFile { number, sequence: number, path, bytes: 0, inode: (0, 0), only_held: false }
    };
    let readable = |walks: &mut BTreeMap<u64, Walk>, held: Vec<HeldFile>| {
        walk_all(held, walks).map(|files| files.iter().map(|file| file.readable_bytes).collect::<Vec<_>>())
    };
    let (one, mut walks) = (command.len() as u64, BTreeMap::new());
    let found = readable(&mut walks, vec![held(1, &format!("{command}{second}{torn}"))]);
    assert_eq!(found.unwrap(), [one]);
    // The server was killed, and has cut the file where its last command ends.
    assert_eq!(readable(&mut walks, vec![held(1, command)]).unwrap(), [one]);
    let whole = format!("{command}{second}{command}{second}");
    assert_eq!(readable(&mut walks, vec![held(1, &whole)]).unwrap(), [whole.len() as u64 - second.len() as u64]);
    let both = vec![held(1, &whole), held(2, second)];
    assert_eq!(readable(&mut walks, both).unwrap(), [whole.len() as u64, 0]);
}

#[test]
fn the_latest_second_counts_also_if_it_stands_in_a_file_that_is_released() {
    let dir = tempfile::tempdir().unwrap();
    let held = |number: u64, content: &str| {
        let path = dir.path().join(number.to_string());
        std::fs::write(&path, content).unwrap();
        HeldFile { number, sequence: number, path, bytes: 0, inode: (0, 0), only_held: false }
    };
    let command = "*1\r\n$4\r\nPING\r\n";
    let ahead = format!("#TS:130\r\n{command}");
    let mut walks = BTreeMap::new();
    let mut newest = |held: Vec<HeldFile>, from: u64| {
        let files = walk_all(held, &mut walks).unwrap();
        let seconds =
            walks.iter().filter_map(|(number, walk)| Some((*number, walk.last_second.zip(walk.newest_second)?)));
        let (manifest, append_dir) = (Manifest { base: None, increments: vec![], history: vec![] }, PathBuf::new());
        let (info, observed_at) = (BTreeMap::new(), Timestamp::UNIX_EPOCH);
        let seconds = seconds.collect();
        Observation { observed_at, timed_until: None, files, manifest, append_dir, info, writes_times: true, seconds }
            .newest_second(from)
    };
    // The clock was set back behind the first file.
    assert_eq!(newest(vec![held(1, &ahead), held(2, command)], 2), Some(130));
    assert_eq!(newest(vec![held(2, command)], 2), Some(130));
    // A server that was started again counts from its clock.
    let later = format!("{command}#TS:101\r\n{command}");
    assert_eq!(newest(vec![held(2, &later), held(3, command)], 3), Some(101));
    assert_eq!(newest(vec![held(3, &format!("{command}#TS:102\r\n{ahead}#TS:103\r\n"))], 3), Some(130));
}

#[test]
fn a_sentinel_is_told_from_a_server_with_data() {
    for mode in ["standalone", "cluster"] {
        require_data(&info(&[("redis_mode", mode)])).unwrap();
    }
    let refused = require_data(&info(&[("redis_mode", "sentinel")])).unwrap_err();
    assert!(refused.message().contains("it is a Sentinel") && refused.hint_text().is_some(), "{refused:?}");
}
