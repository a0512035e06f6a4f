//! Renderings: the desk that announces them, their clients and their end.

use std::sync::Arc;
use std::time::Duration;

use _sse_channel::hub::{Hub, Rendered, Resume, render};
use _sse_channel::queue::{Client, Desk, Kind, Overflow, Taken, drain};

use crate::parts::*;

pub const MODELS: Models = &[
    ("a_renderer_that_has_something_is_announced", a_renderer_that_has_something_is_announced),
    ("a_rendering_ends_while_one_joins_it", a_rendering_ends_while_one_joins_it),
];

fn a_renderer_that_has_something_is_announced() {
    let (hub, key) = hub_with_channel();
    let desk = Arc::new(Client::new(Kind::Queue, 9, Overflow::DropOldest));
    let renderer = Arc::new(Client::new(Kind::Renderer, 9, Overflow::DropOldest));
    renderer.set_desk(Desk { queue: Arc::clone(&desk), token: event(0), is_announced: false });
    let at = hub.begin_rendering(&[key], &renderer, Box::new(())).unwrap().unwrap();
    let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
    hub.register_rendered(&client, at, Resume::Fresh, Box::new(())).unwrap().unwrap();
    let publisher = {
        let hub = Arc::clone(&hub);
        go(move || [(); 3].map(|()| hub.publish(key, draft("x")).unwrap()))
    };
    // Two threads that render: what is not announced is never rendered.
    let rendered = Arc::new(_sse_channel::sync::Mutex::new(0));
    let threads = [0, 1].map(|_| {
        let (hub, desk, renderer) = (Arc::clone(&hub), Arc::clone(&desk), Arc::clone(&renderer));
        let rendered = Arc::clone(&rendered);
        go(move || {
            while let Taken::Event(_) = desk.take_blocking(None) {
                let mut count = 0;
                for event in drain(&renderer, |_| false) {
                    put(&hub, at, &event);
                    count += 1;
                }
                renderer.rest();
                let mut rendered = _sse_channel::sync::lock(&rendered);
                *rendered += count;
                if *rendered == 3 {
                    // One token for each thread: all is done.
                    for n in [1, 2] {
                        offer(&desk, n..=n);
                    }
                }
                if *rendered == 3 {
                    return;
                }
            }
        })
    });
    let all = done(publisher);
    threads.into_iter().for_each(done);
    assert_eq!(waiting(&client), all);
}

fn put(hub: &Hub, at: Rendered, event: &Arc<_sse_channel::event::Event>) {
    let rendered = Arc::new(render(event, draft("rendered")));
    hub.put_rendered(at, id(event), Some(&rendered));
}

fn begin(hub: &Arc<Hub>, key: usize) -> (Rendered, Arc<Client>) {
    let renderer = Arc::new(Client::new(Kind::Renderer, 9, Overflow::DropOldest));
    let at = hub.begin_rendering(&[key], &renderer, Box::new(())).unwrap().unwrap();
    (at, renderer)
}

fn a_rendering_ends_while_one_joins_it() {
    let (hub, key) = hub_with_channel();
    let (at, renderer) = begin(&hub, key);
    let ender = {
        let (hub, renderer) = (Arc::clone(&hub), Arc::clone(&renderer));
        go(move || hub.end_rendering(at, &renderer, Duration::ZERO))
    };
    let joiner = {
        let hub = Arc::clone(&hub);
        go(move || {
            let client = Arc::new(Client::new(Kind::Stream, 9, Overflow::Disconnect));
            let joined = hub.register_rendered(&client, at, Resume::Fresh, Box::new(())).unwrap();
            (client, joined.is_some())
        })
    };
    let published = hub.publish(key, draft("x")).unwrap();
    let (is_over, (client, has_joined)) = (done(ender), done(joiner));
    assert_ne!(is_over, has_joined, "it is joined, and goes on, or over");
    assert_eq!(renderer.is_closed(), is_over);
    if has_joined {
        // Perhaps after that event: it gets the next one in any case.
        let next = hub.publish(key, draft("y")).unwrap();
        drain(&renderer, |_| false).iter().for_each(|event| put(&hub, at, event));
        let got = waiting(&client);
        assert!(got == [published, next] || got == [next], "{got:?}");
    } else {
        assert!(!hub.has_rendered_clients(at) && hub.client_count(key) == 0);
        let (another, _renderer) = begin(&hub, key);
        assert!(hub.register_rendered(&client, another, Resume::Fresh, Box::new(())).is_ok());
    }
}
