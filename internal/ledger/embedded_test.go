package ledger_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

func TestEmbeddedKeepsItsDataAndIdentity(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "us")
	ctx := t.Context()
	run := func(f func(l *ledger.Ledger)) {
		e, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: dir, Logger: logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Shutdown()
		nc, err := e.Connect()
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		l, err := ledger.Open(ctx, ledger.Config{Conn: nc, Logger: logger(t)})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := errors.Join(e.Err(), l.Check(ctx)); err != nil {
			t.Fatal(err)
		}
		f(l)
	}
	var first, second credential.Record
	run(func(l *ledger.Ledger) {
		first = ledgertest.New(l.Incarnation(), "pay/orders")
		if _, err := l.Commit(ctx, first, 0); err != nil {
			t.Fatal(err)
		}
	})
	run(func(l *ledger.Ledger) {
		if l.Incarnation() != first.Incarnation {
			t.Fatalf("incarnation %s, was %s", l.Incarnation(), first.Incarnation)
		}
		r, seq, err := l.Get(ctx, "pay/orders")
		if err != nil || r.Rev != 1 {
			t.Fatalf("rev %d, %v", r.Rev, err)
		}
		second = ledgertest.Next(r, time.Now().Add(time.Hour), credential.NoticeRotated)
		if _, err := l.Commit(ctx, second, seq); err != nil {
			t.Fatal(err)
		}
	})
	run(func(l *ledger.Ledger) {
		if records := whole(t, l); len(records) != 1 || records[0].Rev != 2 {
			t.Fatalf("records: %+v", records)
		}
		if has, err := l.HasSchedule(ctx, "pay/orders"); err != nil || !has {
			t.Fatalf("schedule: %v, %v", has, err)
		}
	})
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(path, "/store/") {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, "nats")); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("the folder has mode %s, %v", info.Mode(), err)
	}
}

func TestEmbeddedRefusals(t *testing.T) {
	refused := func(t *testing.T, cfg ledger.EmbeddedConfig, want string) {
		t.Helper()
		e, err := ledger.StartEmbedded(cfg)
		if err == nil {
			e.Shutdown()
			t.Fatal("it started")
		}
		if !strings.Contains(err.Error(), want) {
			t.Fatalf("got %q, want it to say %q", err, want)
		}
	}
	// used makes a data directory with a ledger in it.
	used := func(t *testing.T) string {
		t.Helper()
		dir := t.TempDir()
		e := startEmbedded(t, dir)
		nc := connect(t, e)
		open(t, ledger.Config{Conn: nc}).Close()
		nc.Close()
		e.Shutdown()
		return dir
	}
	t.Run("no directory", func(t *testing.T) { refused(t, ledger.EmbeddedConfig{}, "no data directory") })
	t.Run("off loopback", func(t *testing.T) {
		for _, host := range []string{"0.0.0.0", "::", "192.0.2.1", "example.com"} {
			refused(t, ledger.EmbeddedConfig{DataDir: t.TempDir(), Host: host}, "needs TLS")
		}
	})
	t.Run("second server", func(t *testing.T) {
		dir := t.TempDir()
		startEmbedded(t, dir)
		refused(t, ledger.EmbeddedConfig{DataDir: dir}, "another rekey server")
	})
	t.Run("port taken", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dir := t.TempDir()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		n, _ := strconv.Atoi(port)
		began := time.Now()
		refused(t, ledger.EmbeddedConfig{DataDir: dir, Port: n}, "address already in use")
		if d := time.Since(began); d > 10*time.Second {
			t.Errorf("it took %s to say so", d)
		}
		startEmbedded(t, dir) // the refused one let go of the directory
	})
	t.Run("a file in the way", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, ledger.EmbeddedConfig{DataDir: path}, "not a directory")
	})
	t.Run("identity lost", func(t *testing.T) {
		dir := used(t)
		if err := os.Remove(filepath.Join(dir, "nats", "identity.json")); err != nil {
			t.Fatal(err)
		}
		refused(t, ledger.EmbeddedConfig{DataDir: dir}, "identity.json is missing although")
	})
	t.Run("identity damaged", func(t *testing.T) {
		for _, content := range []string{"", "{", "{}", `{"operator":"SOAAA"}`} {
			dir := used(t)
			if err := os.WriteFile(filepath.Join(dir, "nats", "identity.json"), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			refused(t, ledger.EmbeddedConfig{DataDir: dir}, "is damaged")
		}
	})
	t.Run("stream unreadable", func(t *testing.T) {
		dir := used(t)
		found, err := filepath.Glob(filepath.Join(dir, "nats", "store", "jetstream", "*", "streams", ledger.LedgerStream, "meta.inf"))
		if err != nil || len(found) != 1 {
			t.Fatalf("%v, %v", found, err)
		}
		if err := os.WriteFile(found[0], []byte("{not json"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, ledger.EmbeddedConfig{DataDir: dir}, "stream KV_rekey in")
	})
}

// canConnect reports whether the server lets a client in.
func canConnect(t *testing.T, url string, opts ...nats.Option) bool {
	t.Helper()
	nc, err := nats.Connect(url, append(opts, nats.Timeout(2*time.Second))...)
	if err != nil {
		return false
	}
	nc.Close()
	return true
}

func TestEmbeddedLetsNobodyIn(t *testing.T) {
	e, other := startEmbedded(t, t.TempDir()), startEmbedded(t, t.TempDir())
	for name, opts := range map[string][]nats.Option{
		"anonymous":               nil,
		"a password":              {nats.UserInfo("rekey", "rekey")},
		"a token":                 {nats.Token("rekey")},
		"another server's engine": {nats.UserCredentials(other.EngineCreds())},
	} {
		if canConnect(t, e.URL(), opts...) {
			t.Errorf("%s was let in", name)
		}
	}
	if !canConnect(t, e.URL(), nats.UserCredentials(e.EngineCreds())) {
		t.Error("the engine was not let in")
	}
	if nc, err := e.Connect(nats.UserCredentials(other.EngineCreds())); err == nil {
		nc.Close()
		t.Error("the connection inside the process asks for no identity")
	}
	if strings.HasPrefix(e.URL(), "nats://127.0.0.1:") == false {
		t.Errorf("it listens on %s", e.URL())
	}
}

func TestEmbeddedTLS(t *testing.T) {
	cert, pool := certificate(t)
	e, err := ledger.StartEmbedded(ledger.EmbeddedConfig{
		DataDir: t.TempDir(), Host: "0.0.0.0", TLS: &tls.Config{Certificates: []tls.Certificate{cert}}, Logger: logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Shutdown)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(e.URL(), "tls://"))
	if err != nil {
		t.Fatalf("URL %s: %v", e.URL(), err)
	}
	engine := nats.UserCredentials(e.EngineCreds())
	if !canConnect(t, "tls://127.0.0.1:"+port, engine, nats.Secure(&tls.Config{RootCAs: pool})) {
		t.Error("no connection over TLS")
	}
	if canConnect(t, "tls://127.0.0.1:"+port, engine) {
		t.Error("a client that does not know the authority was satisfied")
	}
	open(t, ledger.Config{Conn: connect(t, e)}) // inside the process
}

// A consumer may read its own credentials' events and acknowledge them. Everything else is refused by the server.
func TestConsumerPermissions(t *testing.T) {
	e := startEmbedded(t, t.TempDir())
	engine := connect(t, e)
	l := open(t, ledger.Config{Conn: engine})
	ctx := t.Context()
	for _, id := range []credential.ID{"pay/orders", "pay/secret", "shop/cart"} {
		r := ledgertest.Next(ledgertest.New(l.Incarnation(), id), time.Time{}, credential.NoticeRotated)
		r.Rev, r.Entry.Rev = 1, 1
		r.Entry.Hash = r.Entry.Sum()
		if _, err := l.Commit(ctx, r, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.CatchUp(ctx); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []struct {
		consumer string
		ids      []credential.ID
	}{{"shop", nil}, {"", []credential.ID{"a/b"}}, {"a.b", []credential.ID{"a/b"}}, {"*", []credential.ID{"a/b"}}, {"shop", []credential.ID{"a/>"}}} {
		if _, err := e.ConsumerCreds(bad.consumer, bad.ids); err == nil {
			t.Errorf("credentials for consumer %q of %v", bad.consumer, bad.ids)
		}
	}
	creds, err := e.ConsumerCreds("shop-api", []credential.ID{"pay/orders", "shop/cart"})
	if err != nil {
		t.Fatal(err)
	}
	denied := make(chan error, 64)
	nc, err := nats.Connect(e.URL(), nats.UserCredentialBytes(creds), nats.CustomInboxPrefix(ledger.ConsumerInbox("shop-api")),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err }))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()

	// What it may do.
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	cons, err := js.CreateOrUpdateConsumer(ctx, ledger.EventStream, jetstream.ConsumerConfig{
		Durable: ledger.ConsumerDurable("shop-api", "pay/orders"), FilterSubject: events.SubjectFor("", "pay", "orders"), AckPolicy: jetstream.AckExplicitPolicy,
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := cons.Next(jetstream.FetchMaxWait(5 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if ev, err := events.Decode(m.Headers(), m.Data()); err != nil || ev.Subject != "pay/orders" {
		t.Fatalf("got %+v, %v", ev, err)
	}
	if err := m.DoubleAck(ctx); err != nil {
		t.Fatal(err)
	}
	if err := nc.Publish("rekey.ack.shop.cart.shop-api", []byte("1")); err != nil {
		t.Fatal(err)
	}
	acked := make(chan string, 1)
	actx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		_ = l.Acks(actx, 1, func(_ context.Context, id credential.ID, consumer string, _ []byte, _ time.Time) error {
			acked <- string(id) + " " + consumer
			return nil
		})
	}()
	if got := <-acked; got != "shop/cart shop-api" {
		t.Fatalf("acknowledged: %s", got)
	}

	// What it may not.
	for _, subject := range []string{
		"rekey.ack.pay.secret.shop-api", "rekey.ack.pay.orders.other", "rekey.event.rotated.pay.orders", "rekey.work.pg.pay.orders",
		"rekey.revoke.pg.pay.orders", "$KV.rekey.record.pay.orders", "$KV.rekey.control", "$KV.rekey.incident.x",
		"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST", "$JS.API.STREAM.INFO.REKEY_EVENTS", "$JS.API.STREAM.DELETE.KV_rekey",
		"$JS.API.STREAM.MSG.GET.REKEY_EVENTS", "$JS.API.STREAM.MSG.GET.KV_rekey", "$JS.API.DIRECT.GET.KV_rekey.$KV.rekey.record.pay.orders",
		"$JS.API.CONSUMER.CREATE.REKEY_EVENTS", "$JS.API.CONSUMER.CREATE.REKEY_EVENTS.x", "$JS.API.CONSUMER.CREATE.REKEY_EVENTS.x.rekey.event.>",
		"$JS.API.CONSUMER.CREATE.REKEY_EVENTS.shop-api=pay=orders.rekey.event.*.pay.secret",
		"$JS.API.CONSUMER.CREATE.REKEY_EVENTS.other=pay=orders.rekey.event.*.pay.orders",
		"$JS.API.CONSUMER.DURABLE.CREATE.REKEY_EVENTS.x", "$JS.API.CONSUMER.CREATE.KV_rekey.x.$KV.rekey.>",
		"$JS.API.CONSUMER.MSG.NEXT.REKEY_WORK.work=pg", "$JS.API.CONSUMER.DELETE.REKEY_WORK.work=pg", "$SYS.REQ.SERVER.PING",
		"$SRV.PING", "_INBOX.x",
	} {
		if err := nc.Publish(subject, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		expectDenied(t, denied, subject)
	}
	for _, subject := range []string{">", "rekey.>", "rekey.event.>", "rekey.event.rotated.pay.orders", "$KV.>", "$KV.rekey.record.pay.orders", "_INBOX.>", "_INBOX_other.>", "$SYS.>"} {
		if _, err := nc.SubscribeSync(subject); err != nil {
			t.Fatal(err)
		}
		expectDenied(t, denied, subject)
	}
	whole := 0
	if err := l.Events(ctx, ledger.Query{}, func(events.Event) error { whole++; return nil }); err != nil || whole != 3 {
		t.Fatalf("%d events, %v", whole, err)
	}
}

func expectDenied(t *testing.T, denied <-chan error, subject string) {
	t.Helper()
	for {
		select {
		case err := <-denied:
			if errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), `"`+subject+`"`) {
				return
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("%s is not refused", subject)
		}
	}
}
