//! What the board went through while it was measured: heat, throttling and power.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use unimo_devices::board::Board;
use unimo_devices::telemetry::{Telemetry, Throttling};

/// Time from one reading to the next: a monitor of power averages over less.
const EVERY: Duration = Duration::from_millis(250);

/// Readings while something ran, summed up. What the board does not tell is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Conditions {
    /// The hottest of the board's zones at the start, in °C.
    pub start_c: Option<f64>,
    /// And at the end.
    pub end_c: Option<f64>,
    /// What held the board back at any time, in words; such a run is no measure of the board.
    pub held_back: Vec<&'static str>,
    /// Mean power of the whole module, in mW.
    pub power_mw: Option<f64>,
    #[serde(skip)]
    pub(super) readings: usize,
}

impl Conditions {
    /// Reads the files under `root` while some work is done, and gives its result too.
    pub fn during<T>(root: &Path, board: Option<&Board>, work: impl FnOnce() -> T) -> (T, Self) {
        let (done, over) = channel::<()>();
        thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut conditions = Self::default();
                loop {
                    conditions.take_in(&Telemetry::read(root), board);
                    if over.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                        // The last reading is made after the work.
                        conditions.take_in(&Telemetry::read(root), board);
                        return conditions;
                    }
                }
            });
            let result = work();
            drop(done);
            (result, reader.join().unwrap_or_default())
        })
    }

    fn take_in(&mut self, telemetry: &Telemetry, board: Option<&Board>) {
        let (zones, rails) = board.map_or((&[][..], &[][..]), |board| {
            (board.telemetry.thermal_zones.as_slice(), board.telemetry.total_rails.as_slice())
        });
        let celsius = telemetry.hottest_c(zones);
        let causes = telemetry.throttling.map(Throttling::now).unwrap_or_default();
        let one = Self {
            start_c: celsius,
            end_c: celsius,
            held_back: causes.into_iter().map(|cause| cause.words()).collect(),
            power_mw: telemetry.power_mw(rails),
            readings: 1,
        };
        *self = std::mem::take(self).then(one);
    }

    /// These, and those of work that was done after it.
    #[must_use]
    pub fn then(mut self, later: Self) -> Self {
        if self.readings == 0 {
            return later;
        }
        for words in later.held_back {
            if !self.held_back.contains(&words) {
                self.held_back.push(words);
            }
        }
        let readings = self.readings + later.readings;
        let sum = |power: f64, of: usize| power * of as f64 / readings as f64;
        let power_mw =
            self.power_mw.zip(later.power_mw).map(|(power, more)| sum(power, self.readings) + sum(more, later.readings));
        Self { start_c: self.start_c, end_c: later.end_c, held_back: self.held_back, power_mw, readings }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use unimo_devices::board;

    use super::*;

    #[test]
    fn heat_throttling_and_power_are_followed() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let rails = "sys/class/hwmon/hwmon1";
        write("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n");
        write("sys/class/thermal/thermal_zone0/temp", "40000\n");
        write("sys/class/thermal/thermal_zone1/type", "charger\n");
        write("sys/class/thermal/thermal_zone1/temp", "90000\n");
        write(&format!("{rails}/name"), "ina3221\n");
        write(&format!("{rails}/in1_label"), "VDD_IN\n");
        write(&format!("{rails}/in1_input"), "5000\n");
        write(&format!("{rails}/curr1_input"), "1000\n");
        let jetson = board::all().unwrap().into_iter().find(|board| board.name == "jetson-orin-nano").unwrap();
        let work = || {
            write("sys/class/thermal/thermal_zone0/temp", "55500\n");
            7
        };
        let (result, quiet) = Conditions::during(root.path(), Some(&jetson), work);
        assert_eq!(result, 7);
        // The first reading comes before or after the work has begun.
        assert!(quiet.start_c == Some(40.0) || quiet.start_c == Some(55.5), "{quiet:?}");
        assert_eq!((quiet.end_c, quiet.held_back.len(), quiet.power_mw), (Some(55.5), 0, Some(5000.0)));

        // Twice the power, and throttled, for as many readings.
        write(&format!("{rails}/curr1_input"), "2000\n");
        write("sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n");
        let hot = Conditions::during(root.path(), Some(&jetson), || ()).1;
        assert_eq!((hot.readings, hot.power_mw), (2, Some(10_000.0)));
        let both = quiet.clone().then(hot.clone()).then(hot);
        assert_eq!(both.held_back, ["under-voltage", "throttled"]);
        assert_eq!((both.start_c, both.end_c), (quiet.start_c, Some(55.5)));
        let expected = (5000.0 * quiet.readings as f64 + 40_000.0) / (quiet.readings as f64 + 4.0);
        assert!((both.power_mw.unwrap() - expected).abs() < 1e-6);

        let nothing = Conditions::during(&root.path().join("none"), None, || ()).1;
        assert_eq!(nothing, Conditions { readings: nothing.readings, ..Conditions::default() });
    }
}
