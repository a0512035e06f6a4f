//! The extension module `sse_channel._sse_channel`.

mod asyncio;
mod bus;
mod channel;
mod client;
mod errors;
mod greenlets;
mod host;
mod message;
mod offload;
mod parking;
mod queue;
mod rendering;
mod stream;
mod survey;
mod wait;

use pyo3::prelude::*;

#[pymodule]
#[pyo3(name = "_sse_channel")]
mod _sse_channel {
    use super::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use super::bus::{after_fork, before_fork, bus_figures, bus_url, check_bus};
    #[pymodule_export]
    use super::channel::{
        Channel, begin_bus_anew, close_all, encode_frame, figures, prepare, register,
    };
    #[pymodule_export]
    use super::channel::{revocations, watch_streams};
    #[pymodule_export]
    use super::client::Client;
    #[pymodule_export]
    use super::host::{count_refused, host_figures, presence};
    #[pymodule_export]
    use super::offload::{end_streams, offload, offload_figures, unwatch};
    #[pymodule_export]
    use super::parking::{Parking, forked};
    #[pymodule_export]
    use super::queue::Queue;
    #[pymodule_export]
    use super::rendering::{Rendering, SourceEvent};
    #[pymodule_export]
    use super::stream::Stream;
    #[pymodule_export]
    use super::survey::{ask, ask_later, host_view};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        module.add("ChannelClosed", errors::channel_closed(py)?)?;
        module.add("BusError", errors::bus_error(py)?)?;
        module.add("HEARTBEAT", crate::frame::HEARTBEAT)?;
        module.add("REASONS", crate::metrics::Reason::ALL.map(crate::metrics::Reason::name))?;
        module.add("RESET_EVENT", crate::frame::RESET_EVENT)?;
        module.add("ANSWERS_CHANNEL", crate::survey::ANSWERS)?;
        module.add("CONTROL_CHANNEL", crate::control::CHANNEL)?;
        let seconds = |milliseconds| milliseconds as f64 / 1000.0;
        module.add("DELAY_BOUNDS", crate::metrics::BOUNDS.map(seconds).to_vec())?;
        module.add("ANSWERS_FORM", crate::survey::FORM)?;
        module.add("OWN_CHANNELS", crate::control::OWN)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // A hook, not a start: a child must know that it is one before it uses anything.
        let hooks = PyDict::new(py);
        hooks.set_item("before", module.getattr("before_fork")?)?;
        hooks.set_item("after_in_parent", module.getattr("after_fork")?)?;
        hooks.set_item("after_in_child", module.getattr("forked")?)?;
        py.import("os")?.getattr("register_at_fork")?.call((), Some(&hooks))?;
        Ok(())
    }
}
