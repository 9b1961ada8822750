package events

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// bus is an embedded server with the event stream, on a private port that survives restart.
type bus struct {
	t    testing.TB
	opts *server.Options
	srv  *server.Server
	js   jetstream.JetStream
}

func newBus(t testing.TB, change func(*server.Options)) *bus {
	t.Helper()
	b := &bus{t: t, opts: &server.Options{
		Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: t.TempDir(), NoLog: true, NoSigs: true,
		NoSystemAccount: true,
	}}
	if change != nil {
		change(b.opts)
	}
	b.start()
	t.Cleanup(func() { b.stop() })
	return b
}

func (b *bus) start() {
	b.t.Helper()
	opts := *b.opts
	srv, err := server.NewServer(&opts)
	must(b.t, err)
	srv.Start()
	if !srv.ReadyForConnections(10 * time.Second) {
		b.t.Fatal("the NATS server did not start")
	}
	b.srv = srv
	b.opts.Port = srv.Addr().(*net.TCPAddr).Port
}

func (b *bus) stop() {
	b.srv.Shutdown()
	b.srv.WaitForShutdown()
}

func (b *bus) connect(opts ...nats.Option) *nats.Conn {
	b.t.Helper()
	opts = append([]nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(20 * time.Millisecond), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})}, opts...)
	nc, err := nats.Connect(fmt.Sprintf("nats://127.0.0.1:%d", b.opts.Port), opts...)
	must(b.t, err)
	b.t.Cleanup(nc.Close)
	return nc
}

// stream makes the event stream and is how the test publishes.
func (b *bus) stream(opts ...nats.Option) *bus {
	b.t.Helper()
	js, err := jetstream.New(b.connect(opts...))
	must(b.t, err)
	_, err = js.CreateStream(b.t.Context(), jetstream.StreamConfig{Name: Stream, Subjects: []string{SubjectPrefix + ">"}, Duplicates: time.Second})
	must(b.t, err)
	b.js = js
	return b
}

func (b *bus) publish(e Event) uint64 {
	b.t.Helper()
	h, body, err := Encode(e)
	must(b.t, err)
	team, name, _ := strings.Cut(e.Subject, "/")
	return b.raw(SubjectFor(e.Type, team, name), h, body)
}

func (b *bus) raw(subject string, h nats.Header, body []byte) uint64 {
	b.t.Helper()
	for {
		ack, err := b.js.PublishMsg(b.t.Context(), &nats.Msg{Subject: subject, Header: h, Data: body})
		if err == nil {
			return ack.Sequence
		}
		if b.t.Context().Err() != nil {
			b.t.Fatal(err)
		}
	}
}

// series publishes revs from to to of a credential.
func (b *bus) series(credential string, from, to uint64) {
	b.t.Helper()
	for rev := from; rev <= to; rev++ {
		b.publish(sample(credential, rev, Rotated))
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reader is one running subscription and what its handler saw.
type reader struct {
	t      testing.TB
	cancel context.CancelFunc
	done   chan error
	mu     sync.Mutex
	seen   []Event
	more   chan struct{}
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// subscribe starts a subscription whose handler is f; every event that f takes is noted.
func subscribe(t testing.TB, nc *nats.Conn, flt Filter, o Options, f func(context.Context, Event) error) *reader {
	t.Helper()
	if o.Log == nil {
		o.Log = quiet
	}
	if o.Backoff == nil {
		o.Backoff = func(int) time.Duration { return 10 * time.Millisecond }
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &reader{t: t, cancel: cancel, done: make(chan error, 1), more: make(chan struct{}, 1000)}
	go func() {
		r.done <- Subscribe(ctx, nc, flt, o, func(ctx context.Context, e Event) error {
			if f != nil {
				if err := f(ctx, e); err != nil {
					return err
				}
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.seen = append(r.seen, e)
			r.more <- struct{}{}
			return nil
		})
	}()
	t.Cleanup(cancel)
	return r
}

// wait returns the credentials and revs that were handled, when there are n.
func (r *reader) wait(n int) []string {
	r.t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		if got := r.got(); len(got) >= n {
			return got
		}
		select {
		case <-r.more:
		case err := <-r.done:
			r.t.Fatalf("the subscription ended with %v after %q", err, r.got())
		case <-deadline:
			r.t.Fatalf("handled %q, want %d", r.got(), n)
		}
	}
}

func (r *reader) got() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var s []string
	for _, e := range r.seen {
		s = append(s, fmt.Sprintf("%s %d", e.Subject, e.Data.Rev))
	}
	return s
}

func (r *reader) stop() {
	r.t.Helper()
	r.cancel()
	if err := <-r.done; !errors.Is(err, context.Canceled) {
		r.t.Errorf("a subscription that was stopped returned %v", err)
	}
}

func (r *reader) want(want ...string) {
	r.t.Helper()
	if got := r.wait(len(want)); !slices.Equal(got, want) {
		r.t.Errorf("handled %q, want %q", got, want)
	}
}

func revs(credential string, from, to int) []string {
	var s []string
	for i := from; i <= to; i++ {
		s = append(s, fmt.Sprintf("%s %d", credential, i))
	}
	return s
}

func TestSubscribeDeliversInOrderAndResumes(t *testing.T) {
	b := newBus(t, nil).stream()
	b.series("orders/db", 1, 30)
	o := Options{Durable: "api", All: true}
	r := subscribe(t, b.connect(), Filter{}, o, nil)
	r.want(revs("orders/db", 1, 30)...)
	if e := r.seen[4]; e.Sequence != 5 || e.ID != sample("orders/db", 5, Rotated).ID || e.Data.Owner != "orders team" {
		t.Errorf("the fifth event is %+v", e)
	}
	r.stop()
	b.series("orders/db", 31, 40)
	again := subscribe(t, b.connect(), Filter{}, o, nil)
	again.want(revs("orders/db", 31, 40)...)
	again.stop()

	// Where a durable was begun does not matter once it exists, nor does what is asked for then.
	late := subscribe(t, b.connect(), Filter{}, Options{Durable: "late", Since: Since{Sequence: 39}}, nil)
	late.want(revs("orders/db", 39, 40)...)
	late.stop()
	b.series("orders/db", 41, 42)
	late = subscribe(t, b.connect(), Filter{Teams: []string{"orders"}}, Options{Durable: "late", All: true}, nil)
	late.want(revs("orders/db", 41, 42)...)
	late.stop()
}

func TestWhereANewDurableBegins(t *testing.T) {
	b := newBus(t, nil).stream()
	b.series("orders/db", 1, 5)
	info, err := b.js.Stream(t.Context(), Stream)
	must(t, err)
	var between time.Time
	for rev := uint64(6); rev <= 8; rev++ {
		seq := b.publish(sample("orders/db", rev, Rotated))
		m, err := info.GetMsg(t.Context(), seq)
		must(t, err)
		if rev == 6 {
			between = m.Time
		}
	}
	for name, c := range map[string]struct {
		o    Options
		want []string
	}{
		"all":      {Options{All: true}, revs("orders/db", 1, 9)},
		"sequence": {Options{Since: Since{Sequence: 4}}, revs("orders/db", 4, 9)},
		"time":     {Options{Since: Since{Time: between}}, revs("orders/db", 6, 9)},
		"new":      {Options{}, revs("orders/db", 9, 9)},
	} {
		c.o.Durable = name
		r := subscribe(t, b.connect(), Filter{}, c.o, nil)
		defer r.want(c.want...)
		waitFor(t, "the durable", func() bool { _, err := b.js.Consumer(t.Context(), Stream, name); return err == nil })
	}
	b.series("orders/db", 9, 9)
}

// waitFor polls until the condition holds.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("no %s after 30 s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestFilters(t *testing.T) {
	b := newBus(t, nil).stream()
	for rev, typ := range []string{Rotated, Revoked} {
		for _, id := range []string{"orders/db", "orders/cache", "billing/db", "billing/mq"} {
			b.publish(sample(id, uint64(rev+1), typ))
		}
	}
	for name, c := range map[string]struct {
		f    Filter
		want []string
	}{
		"credential":          {Filter{Credentials: []string{"orders/db"}}, []string{"orders/db 1", "orders/db 2"}},
		"team":                {Filter{Teams: []string{"billing"}}, []string{"billing/db 1", "billing/mq 1", "billing/db 2", "billing/mq 2"}},
		"type":                {Filter{Types: []string{"revoked"}}, []string{"orders/db 2", "orders/cache 2", "billing/db 2", "billing/mq 2"}},
		"team and credential": {Filter{Teams: []string{"orders"}, Credentials: []string{"billing/mq", "orders/db", "billing/mq"}, Types: []string{Rotated, "rotated"}}, []string{"orders/db 1", "orders/cache 1", "billing/mq 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{Durable: strings.ReplaceAll(name, " ", "-"), All: true}
			r := subscribe(t, b.connect(), c.f, o, nil)
			r.want(c.want...)
			r.stop()
			var read []string
			must(t, Read(t.Context(), b.connect(), c.f, Since{}, func(e Event) error {
				read = append(read, fmt.Sprintf("%s %d", e.Subject, e.Data.Rev))
				return nil
			}))
			if !slices.Equal(read, c.want) {
				t.Errorf("read %q, want %q", read, c.want)
			}
		})
	}
}

func TestBadArguments(t *testing.T) {
	b := newBus(t, nil).stream()
	nc := b.connect()
	err := Subscribe(t.Context(), nc, Filter{Credentials: []string{"orders.db", "a/*"}, Teams: []string{">"}, Types: []string{"rotten"}},
		Options{Durable: "a.b", All: true, Since: Since{Sequence: 1, Time: time.Now()}}, nil)
	for _, want := range []string{`"orders.db"`, `"a/*"`, `">"`, `"rotten"`, `"a.b"`, "all and since", "a sequence and a time"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, err)
		}
	}
	if err := Read(t.Context(), nc, Filter{Teams: []string{"*"}}, Since{}, nil); err == nil {
		t.Error("Read took a wildcard for a team")
	}
}

// A failing handler sees the same event again, and nothing overtakes it.
func TestRedelivery(t *testing.T) {
	b := newBus(t, nil).stream()
	b.series("orders/db", 1, 3)
	tries := map[uint64]int{}
	var waits []int
	o := Options{Durable: "api", All: true, Backoff: func(n int) time.Duration { waits = append(waits, n); return time.Duration(n) * time.Millisecond }}
	r := subscribe(t, b.connect(), Filter{}, o, func(_ context.Context, e Event) error {
		if tries[e.Data.Rev]++; e.Data.Rev == 2 && tries[2] < 5 {
			return errors.New("not yet")
		}
		return nil
	})
	r.want(revs("orders/db", 1, 3)...)
	r.stop()
	if tries[1] != 1 || tries[2] != 5 || tries[3] != 1 || !slices.Equal(waits, []int{1, 2, 3, 4}) {
		t.Errorf("tries %v, backoff asked for %v", tries, waits)
	}
}

func TestMaxAttemptsSkips(t *testing.T) {
	b := newBus(t, nil).stream()
	b.series("orders/db", 1, 3)
	tries := 0
	r := subscribe(t, b.connect(), Filter{}, Options{Durable: "api", All: true, MaxAttempts: 3}, func(_ context.Context, e Event) error {
		if e.Data.Rev == 2 {
			tries++
			return errors.New("never")
		}
		return nil
	})
	r.want("orders/db 1", "orders/db 3")
	r.stop()
	if tries != 3 {
		t.Errorf("tried %d times", tries)
	}
}

// The same id twice in the stream, as after a repair of a source, is handled once; what is no event is passed over.
func TestDuplicatesAndRubbish(t *testing.T) {
	b := newBus(t, nil).stream()
	b.series("orders/db", 1, 3)
	b.series("orders/db", 1, 3)
	b.raw(SubjectFor(Rotated, "orders", "db"), nil, []byte("rubbish"))
	h, body, err := Encode(sample("billing/db", 1, Rotated))
	must(t, err)
	b.raw(SubjectFor(Rotated, "orders", "db"), h, body) // speaks for another credential
	b.series("orders/db", 4, 4)
	r := subscribe(t, b.connect(), Filter{}, Options{Durable: "api", All: true}, nil)
	r.want(revs("orders/db", 1, 4)...)
	r.stop()
	n := 0
	err = Read(t.Context(), b.connect(), Filter{}, Since{}, func(Event) error { n++; return nil })
	if n != 7 || err == nil || !strings.Contains(err.Error(), "2 messages") {
		t.Errorf("read %d events: %v", n, err)
	}
}

func TestRecentForgetsTheOldest(t *testing.T) {
	r := newRecent(3)
	for i := range 5 {
		r.add(fmt.Sprint(i))
	}
	for i, want := range []bool{false, false, true, true, true} {
		if r.has(fmt.Sprint(i)) != want {
			t.Errorf("has %d: %v", i, !want)
		}
	}
	if len(r.ids) > 3 {
		t.Errorf("%d ids for 3 places", len(r.ids))
	}
}

// A handler that takes longer than AckWait keeps its event; one that died loses it to the next process.
func TestLongHandlerAndDeath(t *testing.T) {
	b := newBus(t, nil).stream()
	o := Options{Durable: "api", All: true, AckWait: 300 * time.Millisecond}
	b.series("orders/db", 1, 2)
	var calls atomic.Int32
	work := func(context.Context, Event) error {
		if calls.Add(1) == 1 {
			time.Sleep(4 * o.AckWait) // work, not a wait for something
		}
		return nil
	}
	one, two := subscribe(t, b.connect(), Filter{}, o, work), subscribe(t, b.connect(), Filter{}, o, work)
	waitFor(t, "two events", func() bool { return len(one.got())+len(two.got()) >= 2 })
	one.stop()
	two.stop()
	if n := calls.Load(); n != 2 { // nobody else was given the event meanwhile
		t.Errorf("the handlers were called %d times", n)
	}

	// Death: the connection is gone while the handler runs, and no acknowledgement ever comes.
	nc := b.connect(nats.NoReconnect())
	got := make(chan Event)
	dead := subscribe(t, nc, Filter{}, o, func(_ context.Context, e Event) error { got <- e; nc.Close(); return nil })
	b.series("orders/db", 3, 4)
	if e := <-got; e.Data.Rev != 3 {
		t.Errorf("rev %d", e.Data.Rev)
	}
	if err := <-dead.done; err == nil || !strings.Contains(err.Error(), "connection is closed") {
		t.Errorf("after its connection closed it returned %v", err)
	}
	next := subscribe(t, b.connect(), Filter{}, o, nil)
	next.want(revs("orders/db", 3, 4)...)
	next.stop()
}

// Two processes of one durable share the events: each is handled by one, and each credential's in order.
func TestTwoSubscribersOnOneDurable(t *testing.T) {
	b := newBus(t, nil).stream()
	var mu sync.Mutex
	var all []string
	note := func(_ context.Context, e Event) error {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, fmt.Sprintf("%s %d", e.Subject, e.Data.Rev))
		return nil
	}
	o := Options{Durable: "api", All: true, AckWait: time.Second}
	one := subscribe(t, b.connect(), Filter{}, o, note)
	ids := []string{"orders/db", "billing/db"}
	for _, id := range ids { // who gets how much of the rest is up to the server
		b.publish(sample(id, 1, Rotated))
	}
	one.wait(2)
	two := subscribe(t, b.connect(), Filter{}, o, note)
	for rev := uint64(2); rev <= 40; rev++ {
		for _, id := range ids {
			b.publish(sample(id, rev, Rotated))
		}
	}
	waitFor(t, "80 events", func() bool { mu.Lock(); defer mu.Unlock(); return len(all) >= 80 })
	one.stop() // the other takes everything from here
	b.series("orders/db", 41, 50)
	waitFor(t, "90 events", func() bool { mu.Lock(); defer mu.Unlock(); return len(all) >= 90 })
	two.stop()
	for id, last := range map[string]int{"orders/db": 50, "billing/db": 40} {
		var got []string
		for _, s := range all {
			if strings.HasPrefix(s, id) {
				got = append(got, s)
			}
		}
		if !slices.Equal(got, revs(id, 1, last)) {
			t.Errorf("handled %q", got)
		}
	}
	if len(one.got()) == 0 || len(two.got()) == 0 {
		t.Errorf("one handled %d, the other %d", len(one.got()), len(two.got()))
	}
}

func TestServerRestart(t *testing.T) {
	b := newBus(t, func(o *server.Options) { o.SyncAlways = true }).stream()
	r := subscribe(t, b.connect(), Filter{}, Options{Durable: "api", All: true, AckWait: time.Second}, nil)
	for i := range uint64(3) {
		b.series("orders/db", 10*i+1, 10*i+5)
		r.wait(int(10*i + 5))
		b.stop()
		b.start()
		b.series("orders/db", 10*i+6, 10*i+10)
		r.wait(int(10*i + 10))
	}
	r.want(revs("orders/db", 1, 30)...)
	r.stop()
}

// An operator deleted the durable: the subscription makes it again where it was, and repeats nothing.
func TestDurableDeleted(t *testing.T) {
	b := newBus(t, nil).stream()
	r := subscribe(t, b.connect(), Filter{}, Options{Durable: "api"}, nil) // made anew it would begin with what comes then
	waitFor(t, "the durable", func() bool { _, err := b.js.Consumer(t.Context(), Stream, "api"); return err == nil })
	b.series("orders/db", 1, 5)
	r.wait(5)
	must(t, b.js.DeleteConsumer(t.Context(), Stream, "api"))
	b.series("orders/db", 6, 10)
	r.want(revs("orders/db", 1, 10)...)
	r.stop()
}

func TestStreamGone(t *testing.T) {
	b := newBus(t, nil)
	nc := b.connect()
	err := Subscribe(t.Context(), nc, Filter{}, Options{Durable: "api", Log: quiet}, nil)
	if !errors.Is(err, jetstream.ErrStreamNotFound) || !strings.Contains(err.Error(), "no stream REKEY_EVENTS") {
		t.Errorf("without a stream: %v", err)
	}
	if err := Read(t.Context(), nc, Filter{}, Since{}, nil); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("read without a stream: %v", err)
	}
	b.stream().series("orders/db", 1, 1)
	r := subscribe(t, nc, Filter{}, Options{Durable: "api", All: true, grace: 500 * time.Millisecond}, nil)
	r.want("orders/db 1")
	must(t, b.js.DeleteStream(t.Context(), Stream))
	if err := <-r.done; !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("after the stream was deleted: %v", err)
	}
}

func TestNotPermitted(t *testing.T) {
	t.Parallel() // it waits for requests that nobody answers
	allow := func(subjects ...string) *server.Permissions {
		return &server.Permissions{Publish: &server.SubjectPermission{Allow: subjects}, Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX.>"}}}
	}
	b := newBus(t, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "admin", Password: "p"},
			{Username: "nothing", Password: "p", Permissions: allow("other.>")},
			{Username: "no-pull", Password: "p", Permissions: allow("$JS.API.CONSUMER.INFO.>", "$JS.API.CONSUMER.CREATE.>", "$JS.API.CONSUMER.DURABLE.>")},
			{Username: "orders", Password: "p", Permissions: allow("$JS.API.CONSUMER.INFO.REKEY_EVENTS.orders", "$JS.API.CONSUMER.CREATE.REKEY_EVENTS.orders.rekey.event.*.orders.*", "$JS.API.CONSUMER.MSG.NEXT.REKEY_EVENTS.orders", "$JS.ACK.REKEY_EVENTS.orders.>")},
		}
	}).stream(nats.UserInfo("admin", "p"))
	b.series("orders/db", 1, 3)
	for _, user := range []string{"nothing", "no-pull"} {
		t.Run(user, func(t *testing.T) {
			err := Subscribe(t.Context(), b.connect(nats.UserInfo(user, "p")), Filter{}, Options{Durable: "api", Log: quiet}, nil)
			if !errors.Is(err, nats.ErrPermissionViolation) || !strings.Contains(err.Error(), "may not read REKEY_EVENTS") {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("least privilege is enough", func(t *testing.T) {
		r := subscribe(t, b.connect(nats.UserInfo("orders", "p")), Filter{Teams: []string{"orders"}}, Options{Durable: "orders", All: true}, nil)
		r.want(revs("orders/db", 1, 3)...)
		r.stop()
		err := Subscribe(t.Context(), b.connect(nats.UserInfo("orders", "p")), Filter{}, Options{Durable: "orders", Log: quiet}, nil)
		if !errors.Is(err, nats.ErrPermissionViolation) {
			t.Errorf("a wider filter: %v", err)
		}
	})
	t.Run("no JetStream", func(t *testing.T) {
		plain := newBus(t, func(o *server.Options) { o.JetStream = false })
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err := Subscribe(ctx, plain.connect(), Filter{}, Options{Durable: "api", Log: quiet}, nil)
		if err == nil || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no stream REKEY_EVENTS") {
			t.Errorf("got %v", err)
		}
	})
}

func TestReadIsBounded(t *testing.T) {
	b := newBus(t, nil).stream()
	nc := b.connect()
	n := 0
	count := func(Event) error { n++; return nil }
	must(t, Read(t.Context(), nc, Filter{}, Since{}, count)) // empty
	if n != 0 {
		t.Errorf("read %d of nothing", n)
	}
	b.series("orders/db", 1, 620) // more than one pull brings
	// Whatever is published while it reads does not keep it.
	rev := uint64(620)
	must(t, Read(t.Context(), nc, Filter{}, Since{Sequence: 11}, func(e Event) error {
		n++
		rev++
		b.publish(sample("orders/db", rev, Rotated))
		return nil
	}))
	if n != 610 {
		t.Errorf("read %d events, want 610", n)
	}
	stop := errors.New("enough")
	if err := Read(t.Context(), nc, Filter{}, Since{}, func(Event) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
	must(t, Read(t.Context(), nc, Filter{}, Since{Time: time.Now().Add(time.Hour)}, func(Event) error { return stop }))
	info, err := b.js.Stream(t.Context(), Stream)
	must(t, err)
	for c := range info.ListConsumers(t.Context()).Info() {
		if c.Config.Durable != "" || c.Config.InactiveThreshold > 10*time.Second {
			t.Errorf("Read left the consumer %+v", c.Config)
		}
	}
}

func BenchmarkSubscribe(b *testing.B) {
	bus := newBus(b, nil).stream()
	bus.series("orders/db", 1, 2000)
	b.ResetTimer()
	for i := range b.N {
		r := subscribe(b, bus.connect(), Filter{}, Options{Durable: fmt.Sprint("b", i), All: true}, nil)
		r.wait(2000)
		r.stop()
	}
	b.ReportMetric(2000*float64(b.N)/b.Elapsed().Seconds(), "events/s")
}
