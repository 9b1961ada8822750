package ledger_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

// rewriteMeta changes the ledger's identity behind its back.
func rewriteMeta(t *testing.T, js jetstream.JetStream, change func(m map[string]any)) {
	t.Helper()
	bucket, err := js.KeyValue(t.Context(), ledger.Bucket)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := bucket.Get(t.Context(), "meta.ledger")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{}
	if err := json.Unmarshal(entry.Value(), &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bucket.Put(t.Context(), "meta.ledger", b); err != nil {
		t.Fatal(err)
	}
}

func TestOpenRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, js jetstream.JetStream, cfg *ledger.Config)
		want   string
		is     error
	}{
		{"another incarnation", func(_ *testing.T, _ jetstream.JetStream, cfg *ledger.Config) { cfg.Incarnation = uuid.New() }, "this is another ledger", nil},
		{"newer layout", func(t *testing.T, js jetstream.JetStream, _ *ledger.Config) {
			rewriteMeta(t, js, func(m map[string]any) { m["schema"] = 2; m["unknown"] = "field" })
		}, "version 2, this build knows 1", credential.ErrSchema},
		{"canary damaged", func(t *testing.T, js jetstream.JetStream, _ *ledger.Config) {
			rewriteMeta(t, js, func(m map[string]any) { m["canary"] = "\x17garbage" })
		}, "canary is damaged", nil},
		{"identity gone", func(t *testing.T, js jetstream.JetStream, _ *ledger.Config) {
			s, err := js.Stream(t.Context(), ledger.LedgerStream)
			if err == nil {
				err = s.Purge(t.Context(), jetstream.WithPurgeSubject("$KV.rekey.meta.ledger"))
			}
			if err != nil {
				t.Fatal(err)
			}
		}, "but not the ledger's identity", nil},
		{"ledger gone", remove(ledger.LedgerStream), "the ledger was lost", nil},
		{"events gone", remove(ledger.EventStream), "stream REKEY_EVENTS is missing", nil},
		{"audit gone", remove(ledger.AuditStream), "stream REKEY_AUDIT is missing", nil},
		{"limit on age", change(func(c *jetstream.StreamConfig) { c.MaxAge = time.Hour }), "would delete records", nil},
		{"limit on bytes", change(func(c *jetstream.StreamConfig) { c.MaxBytes = 1 << 30 }), "would delete records", nil},
		{"no batches", change(func(c *jetstream.StreamConfig) { c.AllowAtomicPublish = false }), "does not allow atomic batches", nil},
		{"more per subject", change(func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 5 }), "last message per subject", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := startEmbedded(t, t.TempDir())
			nc := connect(t, e)
			l := open(t, ledger.Config{Conn: nc})
			if _, err := l.Commit(t.Context(), ledgertest.New(l.Incarnation(), "pay/orders"), 0); err != nil {
				t.Fatal(err)
			}
			l.Close()
			js, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			cfg := ledger.Config{Conn: nc, Incarnation: l.Incarnation()}
			open(t, cfg).Close()
			before := streamNames(t, js)
			c.damage(t, js, &cfg)
			damaged := streamNames(t, js)
			_, err = ledger.Open(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
				t.Fatalf("got %v, want it to say %q", err, c.want)
			}
			if after := streamNames(t, js); after != damaged {
				t.Fatalf("a refused Open changed the streams from %s (of %s) to %s", damaged, before, after)
			}
		})
	}
	t.Run("no connection", func(t *testing.T) {
		if _, err := ledger.Open(t.Context(), ledger.Config{}); err == nil {
			t.Fatal("it opened")
		}
	})
}

func remove(stream string) func(*testing.T, jetstream.JetStream, *ledger.Config) {
	return func(t *testing.T, js jetstream.JetStream, _ *ledger.Config) {
		t.Helper()
		if err := js.DeleteStream(t.Context(), stream); err != nil {
			t.Fatal(err)
		}
	}
}

func change(f func(*jetstream.StreamConfig)) func(*testing.T, jetstream.JetStream, *ledger.Config) {
	return func(t *testing.T, js jetstream.JetStream, _ *ledger.Config) {
		t.Helper()
		s, err := js.Stream(t.Context(), ledger.LedgerStream)
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		f(&cfg)
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
}

func streamNames(t *testing.T, js jetstream.JetStream) string {
	t.Helper()
	var all []string
	names := js.StreamNames(t.Context())
	for name := range names.Name() {
		all = append(all, name)
	}
	if err := names.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

// What only holds doorbells is made again.
func TestOpenRepairsTheWorkStream(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	l := open(t, ledger.Config{Conn: nc})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	remove(ledger.WorkStream)(t, js, nil)
	remove(ledger.AckStream)(t, js, nil)
	again := open(t, ledger.Config{Conn: nc, Incarnation: l.Incarnation()})
	if err := again.EnsureLanes(t.Context(), "pg", 1); err != nil {
		t.Fatal(err)
	}
	if err := again.Ring(t.Context(), credential.LaneWork, "pg", "pay/orders", 1); err != nil {
		t.Fatal(err)
	}
}

// A first Open that died half way is completed by the next.
func TestOpenCompletesACreation(t *testing.T) {
	for name, upTo := range map[string][]string{
		"before the identity": {ledger.EventStream, ledger.AuditStream, ledger.WorkStream, ledger.AckStream},
		"before the events":   {ledger.EventStream, ledger.AuditStream, ledger.WorkStream, ledger.AckStream, "not ready"},
		"before the work":     {ledger.WorkStream, ledger.AckStream, "not ready"},
		"before the end":      {"not ready"},
	} {
		t.Run(name, func(t *testing.T) {
			nc := connect(t, startEmbedded(t, t.TempDir()))
			l := open(t, ledger.Config{Conn: nc})
			js, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			want := l.Incarnation()
			for _, what := range upTo {
				if what == "not ready" {
					rewriteMeta(t, js, func(m map[string]any) { m["ready"] = false })
					continue
				}
				remove(what)(t, js, nil)
			}
			if name == "before the identity" { // an empty stream that never held anything
				s, err := js.Stream(t.Context(), ledger.LedgerStream)
				if err != nil {
					t.Fatal(err)
				}
				cfg := s.CachedInfo().Config
				remove(ledger.LedgerStream)(t, js, nil)
				if _, err := js.CreateStream(t.Context(), cfg); err != nil {
					t.Fatal(err)
				}
				want = uuid.Nil
			}
			again := open(t, ledger.Config{Conn: nc})
			if want != uuid.Nil && again.Incarnation() != want {
				t.Fatalf("incarnation %s, was %s", again.Incarnation(), want)
			}
			if _, err := again.Commit(t.Context(), ledgertest.New(again.Incarnation(), "pay/orders"), 0); err != nil {
				t.Fatal(err)
			}
			whole(t, again)
			open(t, ledger.Config{Conn: nc, Incarnation: again.Incarnation()})
		})
	}
}

// Several processes may open an empty account at once: they agree on one ledger.
func TestOpenTogether(t *testing.T) {
	e := startEmbedded(t, t.TempDir())
	var wg sync.WaitGroup
	ls, errs := make([]*ledger.Ledger, 6), make([]error, 6)
	for i := range ls {
		nc := connect(t, e)
		wg.Go(func() { ls[i], errs[i] = ledger.Open(t.Context(), ledger.Config{Conn: nc}) })
	}
	wg.Wait()
	for i := range ls {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		defer ls[i].Close()
		if ls[i].Incarnation() != ls[0].Incarnation() {
			t.Fatalf("two incarnations: %s and %s", ls[i].Incarnation(), ls[0].Incarnation())
		}
		if _, err := ls[i].Commit(t.Context(), ledgertest.New(ls[i].Incarnation(), credential.ID(fmt.Sprintf("pay/c%d", i))), 0); err != nil {
			t.Fatal(err)
		}
	}
	whole(t, ls[0])
}

// An old server is refused before anything is asked of it.
func TestOpenRefusesAnOldServer(t *testing.T) {
	for version, ok := range map[string]bool{"2.11.9": false, "1.4.1": false, "": false, "nightly": false, "2.12.0-RC.1": true, "2.15.2": true, "3.0.0": true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go serveHandshake(l, version)
		nc, err := ledger.Connect(t.Context(), ledger.ConnectConfig{URL: "nats://" + l.Addr().String(), Timeout: 2 * time.Second})
		if ok {
			if err != nil {
				t.Errorf("version %s: %v", version, err)
				continue
			}
			nc.Close()
			continue
		}
		if err == nil {
			nc.Close()
		}
		if err == nil || version != "" && !strings.Contains(err.Error(), "rekey needs 2.12 or newer") {
			t.Errorf("version %q: %v", version, err)
		}
		raw, err := nats.Connect("nats://" + l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		if _, err := ledger.Open(t.Context(), ledger.Config{Conn: raw}); err == nil {
			t.Errorf("version %q: a ledger was opened", version)
		}
	}
}

// serveHandshake speaks as much of the NATS protocol as a connection needs.
func serveHandshake(l net.Listener, version string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			fmt.Fprintf(c, "INFO {\"server_id\":\"x\",\"version\":%q,\"proto\":1,\"headers\":true,\"max_payload\":1048576}\r\n", version)
			for lines := bufio.NewScanner(c); lines.Scan(); {
				if strings.HasPrefix(lines.Text(), "PING") {
					fmt.Fprint(c, "PONG\r\n")
				}
			}
		}()
	}
}

// The KV API and the nats tool see the ledger as a bucket.
func TestLedgerIsABucket(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	l := open(t, ledger.Config{Conn: nc})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	bucket, err := js.KeyValue(ctx, ledger.Bucket)
	if err != nil {
		t.Fatal(err)
	}
	watch, err := bucket.Watch(ctx, "record.>", jetstream.UpdatesOnly())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Stop() }()
	r := ledgertest.New(l.Incarnation(), "pay/orders")
	seq, err := l.Commit(ctx, r, 0)
	if err != nil {
		t.Fatal(err)
	}
	entry, err := bucket.Get(ctx, "record.pay.orders")
	if err != nil || entry.Revision() != seq {
		t.Fatalf("%+v, %v", entry, err)
	}
	var got credential.Record
	if err := json.Unmarshal(entry.Value(), &got); err != nil || got.ID != "pay/orders" || got.Rev != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	if up := <-watch.Updates(); up == nil || up.Key() != "record.pay.orders" || up.Revision() != seq {
		t.Fatalf("watched %+v", up)
	}
	if _, err := bucket.Update(ctx, "record.pay.orders", []byte("{}"), seq-1); err == nil {
		t.Fatal("the bucket took a stale update")
	}
	stream, err := js.Stream(ctx, ledger.LedgerStream)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(ctx, seq); err == nil {
		t.Fatal("a message could be deleted")
	}
	for _, name := range []string{ledger.EventStream, ledger.AuditStream} {
		s, err := js.Stream(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if s.DeleteMsg(ctx, 1) == nil || s.Purge(ctx) == nil {
			t.Fatalf("%s: a message could be deleted or purged", name)
		}
	}
}

// A record of a newer build is refused, and left untouched, wherever it is met.
func TestNewerRecord(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	l := open(t, ledger.Config{Conn: nc})
	ctx := t.Context()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Commit(ctx, ledgertest.New(l.Incarnation(), "pay/old"), 0); err != nil {
		t.Fatal(err)
	}
	newer := []byte(`{"schema":2,"id":"pay/new","phase":{"a":"shape that this build does not know"}}`)
	if _, err := js.Publish(ctx, "$KV.rekey.record.pay.new", newer); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.Get(ctx, "pay/new"); !errors.Is(err, credential.ErrSchema) {
		t.Fatalf("Get: %v", err)
	}
	records, err := l.List(ctx)
	if !errors.Is(err, credential.ErrSchema) || len(records) != 1 || records[0].ID != "pay/old" {
		t.Fatalf("List: %d records, %v", len(records), err)
	}
	seen, ready := 0, make(chan struct{})
	wctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() { _ = l.Watch(wctx, func(credential.Record) { seen++ }, func() { close(ready) }) }()
	if <-ready; seen != 1 {
		t.Fatalf("Watch saw %d records", seen)
	}
}

// The outbox forgets events and entries after their time; the sourced streams keep them.
func TestOutboxExpires(t *testing.T) {
	nc := connect(t, startEmbedded(t, t.TempDir()))
	l := open(t, ledger.Config{Conn: nc, EventTTL: time.Second, AuditTTL: time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r := ledgertest.New(l.Incarnation(), "pay/orders")
	seq, err := l.Commit(ctx, r, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Commit(ctx, ledgertest.Next(r, time.Now().Add(time.Hour), credential.NoticeRotated), seq); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(ctx, ledger.LedgerStream)
	if err != nil {
		t.Fatal(err)
	}
	left := func(filter string) int {
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(filter))
		if err != nil {
			t.Fatal(err)
		}
		return len(info.State.Subjects)
	}
	if left("$KV.rekey.event.>") != 1 || left("$KV.rekey.audit.>") != 2 {
		t.Fatal("the outbox is empty before its time")
	}
	for left("$KV.rekey.event.>")+left("$KV.rekey.audit.>") > 0 {
		time.Sleep(20 * time.Millisecond)
	}
	if left("$KV.rekey.record.>") != 1 || left("$KV.rekey.schedule.>") != 1 || left("$KV.rekey.meta.>") != 1 {
		t.Fatal("more than the outbox expired")
	}
	whole(t, l) // reads the sourced streams
	lags, err := l.SourceLag(ctx)
	if err != nil || lags[0].Behind != 0 || lags[1].Behind != 0 {
		t.Fatalf("%v, %v", lags, err)
	}
}
