package config

import (
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
)

// maxSocketPath is the longest unix socket that every system accepts (sun_path holds 104 bytes on some).
const maxSocketPath = 103

func (c *checker) server(f fileServer) Server {
	data := absolute(c.dir, orElse(f.DataDir, "data"))
	s := Server{DataDir: data, Listen: f.Listen, Log: Log{Level: orElse(f.Log.Level, "info"), Format: orElse(f.Log.Format, "text")}}
	n, _ := c.root.find([]string{"server", "listen"})
	path := pathed{"server", "listen"}
	socket, unix := strings.CutPrefix(s.Listen, "unix:")
	switch {
	case s.Listen == "":
		unix, socket = true, filepath.Join(data, "api.sock")
	case unix && socket == "":
		c.add(n.at, path, "", "unix: wants a path behind it")
	case unix:
		socket = absolute(c.dir, socket)
	default:
		host, port, err := net.SplitHostPort(s.Listen)
		addr, bad := netip.ParseAddr(host)
		switch {
		case err != nil || port == "":
			c.add(n.at, path, "", "want unix:/path or 127.0.0.1:port")
		case host != "localhost" && (bad != nil || !addr.IsLoopback()):
			c.add(n.at, path, "listen on 127.0.0.1, or on a unix socket", "the API has no TLS of its own, so it listens on this machine only")
		}
	}
	if unix {
		s.Listen = "unix:" + socket
		if len(socket) > maxSocketPath {
			c.add(n.at, path, "set server.listen to a shorter one, such as unix:/run/rekey/api.sock", "the path of the unix socket is longer than the %d bytes that systems accept: %s", maxSocketPath, socket)
		}
	}
	return s
}

func (c *checker) nats(f fileNATS) NATS {
	n := NATS{URL: f.URL, Creds: f.Creds, TLS: f.TLS, Replicas: orElse(f.Replicas, 1), Port: f.Port}
	e := entry{"nats", c.root.field("nats"), pathed{"nats"}}
	if e.node == nil {
		e.node = &node{form: mapping}
	}
	only := func(when string, names ...string) {
		for _, name := range names {
			if field := e.node.field(name); field != nil && (name != "replicas" || f.Replicas > 1) {
				c.add(field.key, append(e.path, name), "", "only counts %s nats.url", when)
			}
		}
	}
	if f.URL == "" {
		n.Port = orElse(f.Port, defaultPort)
		only("with", "creds", "tls", "replicas")
		return n
	}
	only("without", "port")
	for _, one := range strings.Split(f.URL, ",") {
		u, err := url.Parse(strings.TrimSpace(one))
		switch {
		case err != nil || u.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme): // err quotes the URL
			c.at(e, "", "want nats://host:4222 or tls://host:4222, several joined by commas", nil, "url")
		case u.User != nil:
			c.at(e, "use nats.creds: file:/path/to/engine.creds", "holds a user or a password", nil, "url")
		}
	}
	return n
}
