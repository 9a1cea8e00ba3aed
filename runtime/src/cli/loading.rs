//! Tells about a graph that an engine takes long to load, as TensorRT does at the first time.

use std::any::Any;
use std::io::{self, IsTerminal};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use unimo::engine::{EngineOptions, Provider};
use unimo::model::{GraphName, LoadObserver};

/// What takes less is not worth a word.
const SOON: Duration = Duration::from_secs(2);

/// An observer that says on standard error which graph is being loaded, once that has taken a while, and how long it took in the
/// end; where standard error is a terminal, with a clock that runs.
pub fn observer(options: &EngineOptions) -> LoadObserver {
    let (engine, provider) = (options.engine, options.provider);
    Box::new(move |graph: GraphName| -> Box<dyn Any> {
        let what = match provider {
            Provider::Tensorrt => format!("TensorRT builds an engine for `{}`{}", graph.name(), kept()),
            _ => format!("{engine} loads `{}` for {provider}", graph.name()),
        };
        let clock = io::stderr().is_terminal();
        Box::new(Notice::start(SOON, what, move |said| if clock { run_clock(said) } else { Box::new(say(said)) }))
    })
}

/// Where the engine that TensorRT builds is kept.
fn kept() -> String {
    #[cfg(feature = "ort")]
    if let Some(folder) = unimo::engine::tensorrt_cache() {
        return format!(", once for this machine: it is kept in {}", folder.display());
    }
    String::new()
}

fn say(said: &str) -> impl FnOnce(Duration) + use<> {
    eprintln!("{said} …");
    |took| eprintln!("… done after {:.0} s", took.as_secs_f64())
}

fn run_clock(said: &str) -> Box<dyn FnOnce(Duration)> {
    let style = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]").unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner().with_style(style).with_message(said.to_owned()).with_elapsed(SOON);
    bar.enable_steady_tick(Duration::from_millis(200));
    Box::new(move |_| bar.finish_and_clear())
}

/// Words about something that goes on, said only once it has gone on for a while. It ends when this is dropped.
struct Notice {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Notice {
    /// Begins to wait; `show` says the words, and gives what is to be done at the end with the time it all took.
    fn start(soon: Duration, words: String, show: impl FnOnce(&str) -> Box<dyn FnOnce(Duration)> + Send + 'static) -> Self {
        let (end, ended) = mpsc::channel::<()>();
        let begun = Instant::now();
        let thread = thread::spawn(move || {
            if ended.recv_timeout(soon) == Err(RecvTimeoutError::Timeout) {
                let at_end = show(&words);
                let _ = ended.recv();
                at_end(begun.elapsed());
            }
        });
        Self { end: Some(end), thread: Some(thread) }
    }
}

impl Drop for Notice {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What is said about something that ends when `end` says so.
    fn said(soon: Duration, end: impl FnOnce(&Mutex<Vec<String>>)) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let of_thread = lines.clone();
        let notice = Notice::start(soon, "building".to_owned(), move |words| {
            of_thread.lock().unwrap().push(words.to_owned());
            Box::new(move |took| of_thread.lock().unwrap().push(format!("took time: {}", took > Duration::ZERO)))
        });
        end(&lines);
        drop(notice);
        let lines = lines.lock().unwrap();
        lines.clone()
    }

    #[test]
    fn what_ends_soon_is_not_worth_a_word() {
        assert!(said(Duration::from_secs(3600), |_| ()).is_empty());
    }

    #[test]
    fn what_takes_long_is_told_at_once_and_at_its_end() {
        let until_told = |lines: &Mutex<Vec<String>>| {
            while lines.lock().unwrap().is_empty() {
                thread::sleep(Duration::from_millis(1));
            }
        };
        assert_eq!(said(Duration::ZERO, until_told), ["building", "took time: true"]);
    }
}
