//! Telemetry on trees of files as boards have them.

use super::*;

/// A tree of files: paths below the root, and their contents.
fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (path, contents) in files {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents).unwrap();
    }
    folder
}

#[test]
fn a_raspberry_pi() {
    let folder = tree(&[
        ("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n"),
        ("sys/class/thermal/thermal_zone0/temp", "61835\n"),
        ("sys/class/thermal/cooling_device0/type", "gpio-fan\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/affected_cpus", "0 1 2 3\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1800000\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq", "600000\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq", "1800000\n"),
        ("sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "ondemand\n"),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n"),
        ("sys/devices/platform/soc/soc:audio/name", "x\n"),
    ]);
    let found = Telemetry::read(folder.path());
    assert_eq!(found.temperatures, [Temperature { zone: "cpu-thermal".to_owned(), temperature_c: 61.835 }]);
    let clock = Clock {
        policy: "policy0".to_owned(),
        cores: "0 1 2 3".to_owned(),
        current_mhz: 1800,
        lowest_mhz: Some(600),
        highest_mhz: Some(1800),
        governor: Some("ondemand".to_owned()),
    };
    assert_eq!(found.clocks, [clock]);
    assert_eq!(found.throttling, Some(Throttling { bits: 0x50005 }));
    assert_eq!(found.absent, ["power rails (no INA3221 monitor)"]);
    assert_eq!(found.hottest_c(&["cpu-thermal".to_owned()]), Some(61.835));
    assert_eq!(found.power_mw(&["VDD_IN".to_owned()]), None);
}

#[test]
fn each_throttling_bit_has_its_meaning() {
    use ThrottlingCause::{FrequencyCapped, SoftTemperatureLimit, Throttled, UnderVoltage};
    let cases: [(u32, &[ThrottlingCause], &[ThrottlingCause]); 8] = [
        (0, &[], &[]),
        (1, &[UnderVoltage], &[]),
        (1 << 1, &[FrequencyCapped], &[]),
        (1 << 2, &[Throttled], &[]),
        (1 << 3, &[SoftTemperatureLimit], &[]),
        (0x50005, &[UnderVoltage, Throttled], &[UnderVoltage, Throttled]),
        (0xA0000, &[], &[FrequencyCapped, SoftTemperatureLimit]),
        (0xFFF0_FFF0, &[], &[]),
    ];
    for (bits, now, since_start) in cases {
        let found = Throttling { bits };
        assert_eq!((found.now(), found.since_start()), (now.to_vec(), since_start.to_vec()), "{bits:#x}");
    }
}

#[test]
fn the_firmware_is_found_wherever_it_is() {
    for (path, contents, bits) in [
        ("soc/soc:firmware/get_throttled", "0\n", Some(0)),
        ("soc@107c000000/soc@107c000000:firmware/get_throttled", "0x80008\n", Some(0x80008)),
        ("soc:firmware/get_throttled", "e0000\n", Some(0xE0000)),
        ("soc/soc:firmware/get_throttled", "unknown\n", None),
        ("soc/soc:audio/get_throttled", "0\n", None),
    ] {
        let folder = tree(&[(&format!("sys/devices/platform/{path}"), contents)]);
        assert_eq!(Telemetry::read(folder.path()).throttling.map(|found| found.bits), bits, "{path}");
    }
}

#[test]
fn a_jetson_with_linuxs_driver() {
    let monitor = "sys/class/hwmon/hwmon1";
    let folder = tree(&[
        ("sys/class/hwmon/hwmon0/name", "nvme\n"),
        ("sys/class/hwmon/hwmon0/in1_label", "VDD_FAKE\n"),
        ("sys/class/hwmon/hwmon0/in1_input", "1\n"),
        ("sys/class/hwmon/hwmon0/curr1_input", "1\n"),
        (&format!("{monitor}/name"), "ina3221\n"),
        (&format!("{monitor}/in1_label"), "VDD_IN\n"),
        (&format!("{monitor}/in1_input"), "5072\n"),
        (&format!("{monitor}/curr1_input"), "1008\n"),
        (&format!("{monitor}/in2_label"), "VDD_CPU_GPU_CV\n"),
        (&format!("{monitor}/in2_input"), "5072\n"),
        (&format!("{monitor}/curr2_input"), "96\n"),
        (&format!("{monitor}/in3_label"), "NC\n"),
        (&format!("{monitor}/in3_input"), "0\n"),
        (&format!("{monitor}/curr3_input"), "0\n"),
        ("sys/class/thermal/thermal_zone10/type", "tj-thermal\n"),
        ("sys/class/thermal/thermal_zone10/temp", "48500\n"),
        ("sys/class/thermal/thermal_zone2/type", "cpu-thermal\n"),
        ("sys/class/thermal/thermal_zone2/temp", "47000\n"),
        // Switched off: the kernel gives an error or nothing.
        ("sys/class/thermal/thermal_zone3/type", "cv0-thermal\n"),
        ("sys/class/thermal/thermal_zone3/temp", ""),
    ]);
    let found = Telemetry::read(folder.path());
    let rails: Vec<(&str, i64, i64, f64)> =
        found.rails.iter().map(|rail| (rail.name.as_str(), rail.voltage_mv, rail.current_ma, rail.power_mw)).collect();
    assert_eq!(rails, [("VDD_IN", 5072, 1008, 5112.576), ("VDD_CPU_GPU_CV", 5072, 96, 486.912)]);
    let zones: Vec<&str> = found.temperatures.iter().map(|temperature| temperature.zone.as_str()).collect();
    assert_eq!(zones, ["cpu-thermal", "tj-thermal"]);
    let names = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    assert_eq!(found.hottest_c(&names(&["cpu-thermal", "gpu-thermal"])), Some(47.0));
    assert_eq!(found.hottest_c(&names(&["CPU-therm"])), Some(48.5));
    assert_eq!(found.power_mw(&names(&["VDD_IN", "VDD_CPU_GPU_CV"])), Some(5112.576 + 486.912));
    assert_eq!((found.power_mw(&names(&["VDD_IN", "VDD_X"])), found.power_mw(&[])), (None, None));
}

#[test]
fn a_jetson_with_nvidias_older_driver() {
    let device = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0";
    let folder = tree(&[
        (&format!("{device}/rail_name_0"), "POM_5V_IN\n"),
        (&format!("{device}/in_voltage0_input"), "5040\n"),
        (&format!("{device}/in_current0_input"), "352\n"),
        (&format!("{device}/in_power0_input"), "1774\n"),
        (&format!("{device}/rail_name_1"), "POM_5V_GPU\n"),
        (&format!("{device}/rail_name_2"), "NC\n"),
        (&format!("{device}/in_voltage2_input"), "0\n"),
        (&format!("{device}/in_current2_input"), "0\n"),
        (&format!("{device}/in_power2_input"), "0\n"),
    ]);
    let expected = Rail { name: "POM_5V_IN".to_owned(), voltage_mv: 5040, current_ma: 352, power_mw: 1774.0 };
    assert_eq!(Telemetry::read(folder.path()).rails, [expected]);
}

#[test]
fn what_the_hardware_tells_goes_first_and_a_name_is_never_empty() {
    let policy = "sys/devices/system/cpu/cpufreq/policy4";
    let folder = tree(&[
        (&format!("{policy}/scaling_cur_freq"), "1800000\n"),
        (&format!("{policy}/cpuinfo_cur_freq"), "1500398\n"),
        (&format!("{policy}/scaling_governor"), "\n"),
        // Without a name, and with an empty one.
        ("sys/class/thermal/thermal_zone0/temp", "40000\n"),
        ("sys/class/thermal/thermal_zone1/temp", "-1500\n"),
        ("sys/class/thermal/thermal_zone1/type", "\n"),
    ]);
    let found = Telemetry::read(folder.path());
    let clock = Clock {
        policy: "policy4".to_owned(),
        cores: String::new(),
        current_mhz: 1500,
        lowest_mhz: None,
        highest_mhz: None,
        governor: None,
    };
    assert_eq!(found.clocks, [clock]);
    let zones: Vec<(&str, f64)> = found.temperatures.iter().map(|found| (found.zone.as_str(), found.temperature_c)).collect();
    assert_eq!(zones, [("thermal_zone0", 40.0), ("thermal_zone1", -1.5)]);
}

#[test]
fn a_machine_that_tells_nothing() {
    let found = Telemetry::read(tree(&[]).path());
    let absent: Vec<&str> = found.absent.iter().map(|name| name.split(" (").next().unwrap()).collect();
    assert_eq!(absent, ["temperatures", "clocks", "throttling", "power rails"]);
    assert!(found.hottest_c(&[]).is_none());
}
