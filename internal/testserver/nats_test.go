//go:build unix

package testserver_test

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/testserver"
)

func startNATS(t *testing.T, cfg testserver.NATSConfig) *testserver.NATS {
	t.Helper()
	testserver.Need(t, "nats")
	n, err := testserver.StartNATS(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func TestNATS(t *testing.T) {
	for name, cfg := range map[string]testserver.NATSConfig{"one": {TLS: true}, "cluster": {Nodes: 3}} {
		t.Run(name, func(t *testing.T) {
			n := startNATS(t, cfg)
			opts := []nats.Option{nats.UserCredentials(n.CredsFile), nats.ReconnectWait(20 * time.Millisecond), nats.MaxReconnects(-1)}
			var tls []nats.Option
			if n.CAFile != "" {
				tls = append(tls, nats.RootCAs(n.CAFile))
			}
			if nc, err := nats.Connect(n.URL, tls...); err == nil {
				nc.Close()
				t.Fatal("an anonymous connection was accepted")
			}
			nc, err := nats.Connect(n.URL, append(opts, tls...)...)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			js, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			stream, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Replicas: max(cfg.Nodes, 1)})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := js.Publish(ctx, "s", []byte("kept")); err != nil {
				t.Fatal(err)
			}
			// Killed and started again, it still has what it acknowledged.
			node := n.Named(nc.ConnectedServerName())
			if node < 0 || n.PID(node) == 0 {
				t.Fatalf("connected to %q, process %d", nc.ConnectedServerName(), node)
			}
			n.Kill(node)
			if n.PID(node) != 0 {
				t.Fatal("killed, it still has a process")
			}
			if err := n.Start(node); err != nil {
				t.Fatal(err)
			}
			for {
				try, cancel := context.WithTimeout(ctx, 2*time.Second) // a request may be lost with its connection
				m, err := stream.GetLastMsgForSubject(try, "s")
				cancel()
				if err == nil && string(m.Data) == "kept" {
					break
				}
				if ctx.Err() != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
