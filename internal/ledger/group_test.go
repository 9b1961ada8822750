package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// opened is a ledger on an embedded server of its own; change, if not nil, adjusts its configuration.
func opened(t testing.TB, change func(*Config)) *Ledger {
	t.Helper()
	e, err := StartEmbedded(EmbeddedConfig{DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Shutdown)
	nc, err := e.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	cfg := Config{Conn: nc}
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	l, err := Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// step is a committable record; ledgertest cannot be imported from inside the package.
func step(l *Ledger, id credential.ID, rev uint64, due time.Time, announce ...string) credential.Record {
	r := credential.Record{Schema: credential.Schema, ID: id, Incarnation: l.Incarnation(), Rev: rev, Phase: credential.Idle, Due: due}
	r.Entry = credential.Entry{Credential: id, Rev: rev, At: time.Now().UTC(), Action: "test", To: r.Phase}
	for _, kind := range announce {
		r.Announce = append(r.Announce, credential.Notice{Type: kind})
	}
	r.Entry.Hash = r.Entry.Sum()
	return r
}

// counter is an Observer.
type counter struct {
	mu      sync.Mutex
	commits map[string]int
	batches map[string]int
	sizes   []int // transitions per batch
	most    int   // messages
}

func (c *counter) Committed(result string, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.commits == nil {
		c.commits = map[string]int{}
	}
	c.commits[result]++
}

func (c *counter) Batched(result string, transitions, messages int, took time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.batches == nil {
		c.batches = map[string]int{}
	}
	c.batches[result]++
	c.sizes = append(c.sizes, transitions)
	c.most = max(c.most, messages)
}

func TestCommitsShareBatches(t *testing.T) {
	var seen counter
	l := opened(t, func(c *Config) { c.Observer, c.Linger = &seen, 50*time.Millisecond })
	const n = 700 // of 4 messages: they cannot fit into one batch
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			r := step(l, credential.ID(fmt.Sprintf("pay/c%d", i)), 1, time.Now().Add(time.Hour), credential.NoticeRotated)
			if _, err := l.Commit(t.Context(), r, 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if seen.commits["ok"] != n || len(seen.commits) != 1 {
		t.Errorf("commits: %v", seen.commits)
	}
	if seen.most > maxBatch || slices.Max(seen.sizes) < 100 || seen.batches["committed"] > 30 || len(seen.batches) != 1 {
		t.Errorf("%v batches of %v transitions, at most %d messages", seen.batches, seen.sizes, seen.most)
	}
}

// gathering is a ledger whose committer does not run, to look at gather alone.
func gathering(linger time.Duration) *Ledger {
	return &Ledger{cfg: Config{Linger: linger}.withDefaults(), queue: make(chan *request, 8*maxBatch), stop: make(chan struct{})}
}

func waitingFor(id string, msgs int) *request {
	return &request{id: credential.ID(id), msgs: make([]*nats.Msg, msgs), bytes: msgs, done: make(chan result, 1)}
}

func ids(qs []*request) string {
	var s []string
	for _, q := range qs {
		s = append(s, string(q.id))
	}
	return strings.Join(s, " ")
}

func TestGather(t *testing.T) {
	l := gathering(-1)
	a1, b, a2, a3, gone, c := waitingFor("a", 4), waitingFor("b", 4), waitingFor("a", 4), waitingFor("a", 4), waitingFor("gone", 4), waitingFor("c", 4)
	gone.state.Store(givenUp)
	for _, q := range []*request{a1, b, a2, gone, a3, c} {
		l.queue <- q
	}
	batch, rest, open := l.gather(nil)
	if ids(batch) != "a b c" || ids(rest) != "a a" || !open || batch[0] != a1 || rest[0] != a2 {
		t.Fatalf("batch %q, rest %q", ids(batch), ids(rest))
	}
	batch, rest, _ = l.gather(rest)
	if ids(batch) != "a" || batch[0] != a2 || len(rest) != 1 || rest[0] != a3 {
		t.Fatalf("then batch %q, rest %q", ids(batch), ids(rest))
	}
	// Whoever has waited is first, and what does not fit keeps its credential's order.
	big, late := waitingFor("big", 998), waitingFor("big", 1)
	l.queue <- big
	l.queue <- late
	batch, rest, _ = l.gather(rest)
	if len(batch) != 1 || batch[0] != a3 || ids(rest) != "big" || rest[0] != big {
		t.Fatalf("with a big one: batch %q, rest %q", ids(batch), ids(rest))
	}
	batch, rest, _ = l.gather(rest)
	if ids(batch) != "big" || batch[0] != big || ids(rest) != "big" || rest[0] != late {
		t.Fatalf("then: batch %q, rest %q", ids(batch), ids(rest))
	}
	heavy := waitingFor("heavy", 1)
	heavy.bytes = 2 * maxBatchBytes // alone it may
	l.queue <- waitingFor("light", 1)
	l.queue <- heavy
	batch, rest, _ = l.gather(nil)
	if ids(batch) != "light" || ids(rest) != "heavy" {
		t.Fatalf("heavy: batch %q, rest %q", ids(batch), ids(rest))
	}
	if batch, _, _ = l.gather(rest); ids(batch) != "heavy" {
		t.Fatalf("heavy alone: batch %q", ids(batch))
	}
	// One caller who gave up is not the end; Close is, after the last one.
	l.queue <- gone
	if batch, _, open = l.gather(nil); len(batch) != 0 || !open {
		t.Fatal("a caller who gave up ended the committer")
	}
	l.queue <- waitingFor("last", 1)
	close(l.stop)
	if batch, _, _ = l.gather(nil); ids(batch) != "last" {
		t.Fatal("what was accepted is forgotten by Close")
	}
	if _, _, open = l.gather(nil); open {
		t.Fatal("Close does not end the committer")
	}
}

// What the server answers to a batch, and what we make of it.
func TestBatchAnswers(t *testing.T) {
	l := opened(t, nil)
	plain := func(subject string, header ...string) *nats.Msg {
		m := nats.NewMsg(subject)
		m.Data = []byte("{}")
		for i := 0; i < len(header); i += 2 {
			m.Header.Set(header[i], header[i+1])
		}
		return m
	}
	many := func(n int) (msgs []*nats.Msg) {
		for i := range n {
			msgs = append(msgs, plain(fmt.Sprintf("%stest.m%d", kv, i)))
		}
		return msgs
	}
	last := func() uint64 {
		info, err := l.stream.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return info.State.LastSeq
	}
	at := last()
	if first, err := l.publish(many(maxBatch)); err != nil || first != at+1 || last() != at+maxBatch {
		t.Fatalf("%d messages after %d: first %d, last %d, %v", maxBatch, at, first, last(), err)
	}
	if m, err := l.stream.GetMsg(t.Context(), at+7); err != nil || m.Subject != kv+"test.m6" {
		t.Fatalf("message 7 of the batch: %+v, %v", m, err)
	}
	if _, err := l.publish([]*nats.Msg{plain(kv+"test.id", jetstream.MsgIDHeader, "one")}); err != nil {
		t.Fatal(err)
	}
	at = last()
	for name, c := range map[string]struct {
		msgs []*nats.Msg
		code jetstream.ErrorCode
		want verdict
	}{
		"too many":                  {many(maxBatch + 1), 10199, refused},
		"stale":                     {[]*nats.Msg{plain(kv + "test.x"), plain(kv+"test.m1", jetstream.ExpectedLastSubjSeqHeader, "1")}, codeWrongLast, stale},
		"absent":                    {[]*nats.Msg{plain(kv+"test.none", jetstream.ExpectedLastSubjSeqHeader, "1")}, codeWrongLast, stale},
		"id known":                  {[]*nats.Msg{plain(kv + "test.x"), plain(kv+"test.y", jetstream.MsgIDHeader, "one")}, codeDuplicateID, stale},
		"id twice":                  {[]*nats.Msg{plain(kv+"test.x", jetstream.MsgIDHeader, "two"), plain(kv+"test.y", jetstream.MsgIDHeader, "two")}, codeDuplicateID, stale},
		"bad time":                  {[]*nats.Msg{plain(kv + "test.x"), plain(kv+"test.y", jetstream.MsgTTLHeader, "soon")}, 10165, refused},
		"target outside the stream": {[]*nats.Msg{plain(kv+"test.x", jetstream.ScheduleHeader, "@at 2030-01-01T00:00:00Z", jetstream.ScheduleTargetHeader, "elsewhere")}, 10190, refused},
	} {
		_, err := l.publish(c.msgs)
		var api *jetstream.APIError
		if !errors.As(err, &api) || api.ErrorCode != c.code || judge(err) != c.want {
			t.Errorf("%s: %v (%v), want code %d (%v)", name, err, judge(err), c.code, c.want)
		}
		if now := last(); now != at {
			t.Fatalf("%s: a refused batch wrote %d messages", name, now-at)
		}
	}
	if _, err := l.publish([]*nats.Msg{plain("nobody.listens")}); judge(err) != again {
		t.Errorf("nobody listens: %v", err)
	}
	for err, want := range map[error]verdict{
		nil: committed, context.DeadlineExceeded: unknown, nats.ErrConnectionClosed: unknown, nats.ErrTimeout: unknown,
		nats.ErrReconnectBufExceeded: again, fmt.Errorf("%w: %w", errNotCommitted, nats.ErrConnectionClosed): unsent,
		&jetstream.APIError{Code: 503, ErrorCode: codeStoreFailed}: unknown, &jetstream.APIError{Code: 503, ErrorCode: 10023}: unknown,
		&jetstream.APIError{Code: 400, ErrorCode: codeIncomplete}: again, &jetstream.APIError{Code: 429, ErrorCode: codeTooManyAtOnce}: again,
		&jetstream.APIError{Code: 400, ErrorCode: codeWrongLastReplicated}: stale,
	} {
		if got := judge(err); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
}

// The server does not say which member it refuses: only that one fails.
func TestOnlyTheOffenderFails(t *testing.T) {
	l := opened(t, nil)
	var batch []*request
	for i := range 9 {
		r := step(l, credential.ID(fmt.Sprintf("pay/c%d", i)), 1, time.Time{})
		msgs, err := l.messages(r, 0)
		if err != nil {
			t.Fatal(err)
		}
		switch i {
		case 2: // will never be accepted
			msgs[1].Header.Set(jetstream.MsgTTLHeader, "soon")
		case 5: // an id that was used before, with a compare-and-set that holds
			msgs[1].Header.Set(jetstream.MsgIDHeader, "same")
		case 7:
			msgs[1].Header.Set(jetstream.MsgIDHeader, "same")
		}
		batch = append(batch, &request{id: r.ID, msgs: msgs, done: make(chan result, 1)})
	}
	l.flush(batch)
	for i, q := range batch {
		res := <-q.done
		_, at, err := l.Get(t.Context(), q.id)
		switch {
		case i == 2:
			if res.err == nil || errors.Is(res.err, credential.ErrStale) || errors.Is(res.err, credential.ErrUncertain) || !errors.Is(err, credential.ErrNotFound) {
				t.Errorf("%d: %v, %v", i, res.err, err)
			}
		case i == 7: // 5 was first
			if !errors.Is(res.err, credential.ErrStale) || !errors.Is(err, credential.ErrNotFound) {
				t.Errorf("%d: %v, %v", i, res.err, err)
			}
		case res.err != nil || err != nil || res.seq != at:
			t.Errorf("%d: sequence %d, %v; Get says %d, %v", i, res.seq, res.err, at, err)
		}
	}
}

// answerer takes the place of the server: it answers batches as told.
func answerer(t *testing.T, answer func(n int, m *nats.Msg) any) *Ledger {
	t.Helper()
	real := opened(t, nil)
	l := &Ledger{
		cfg: Config{Conn: real.nc, Timeout: 300 * time.Millisecond}.withDefaults(), nc: real.nc, js: real.js, stream: real.stream, meta: real.meta, log: real.log,
		queue: make(chan *request, maxBatch), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	// The stream goes, so that its subjects are free for us.
	if err := real.js.DeleteStream(t.Context(), LedgerStream); err != nil {
		t.Fatal(err)
	}
	var n atomic.Int32
	sub, err := real.nc.Subscribe(kv+">", func(m *nats.Msg) {
		if m.Header.Get(headerBatchCommit) == "" {
			return
		}
		if a := answer(int(n.Add(1)), m); a != nil {
			b, _ := json.Marshal(a)
			_ = m.Respond(b)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	go l.commitLoop()
	t.Cleanup(l.Close)
	return l
}

type refusal struct {
	Error *jetstream.APIError `json:"error"`
}

func TestUnknownAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(n int, m *nats.Msg) any
		want   error // nil: an error that is neither stale nor uncertain
		sent   int32
	}{
		"none":    {func(int, *nats.Msg) any { return nil }, credential.ErrUncertain, 1},
		"garbage": {func(int, *nats.Msg) any { return "what?" }, credential.ErrUncertain, 1},
		"other batch": {func(int, *nats.Msg) any {
			return map[string]any{"stream": LedgerStream, "seq": 9, "batch": "x", "count": 2}
		}, credential.ErrUncertain, 1},
		"wrong count": {func(_ int, m *nats.Msg) any {
			return map[string]any{"stream": LedgerStream, "seq": 9, "batch": m.Header.Get(headerBatchID), "count": 1}
		}, credential.ErrUncertain, 1},
		"store failed": {func(int, *nats.Msg) any { return refusal{&jetstream.APIError{Code: 503, ErrorCode: codeStoreFailed}} }, credential.ErrUncertain, 1},
		"never":        {func(int, *nats.Msg) any { return refusal{&jetstream.APIError{Code: 400, ErrorCode: codeIncomplete}} }, nil, commitTries},
		"refused":      {func(int, *nats.Msg) any { return refusal{&jetstream.APIError{Code: 400, ErrorCode: 10174}} }, nil, 1},
		"lost first": {func(n int, m *nats.Msg) any {
			if n == 1 {
				return refusal{&jetstream.APIError{Code: 400, ErrorCode: codeIncomplete}}
			}
			return nil
		}, credential.ErrUncertain, 2},
	} {
		t.Run(name, func(t *testing.T) {
			var sent atomic.Int32
			l := answerer(t, func(n int, m *nats.Msg) any { sent.Store(int32(n)); return c.answer(n, m) })
			_, err := l.Commit(t.Context(), step(l, "pay/orders", 1, time.Time{}), 0)
			uncertain, outdated := errors.Is(err, credential.ErrUncertain), errors.Is(err, credential.ErrStale)
			if err == nil || outdated || uncertain != (c.want != nil) {
				t.Errorf("got %v", err)
			}
			if sent.Load() != c.sent {
				t.Errorf("sent %d times, want %d", sent.Load(), c.sent)
			}
		})
	}
}

// A caller who leaves learns whether its commit may have happened, and Close waits for what is under way.
func TestLeavingAndClosing(t *testing.T) {
	arrived, release := make(chan struct{}, 8), make(chan struct{})
	l := answerer(t, func(_ int, m *nats.Msg) any {
		arrived <- struct{}{}
		<-release
		return map[string]any{"stream": LedgerStream, "seq": 100, "batch": m.Header.Get(headerBatchID), "count": 2}
	})
	l.cfg.Timeout = 10 * time.Second
	first := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { _, err := l.Commit(ctx, step(l, "pay/a", 1, time.Time{}), 0); first <- err }()
	<-arrived
	second := make(chan error, 1)
	go func() { _, err := l.Commit(ctx, step(l, "pay/b", 1, time.Time{}), 0); second <- err }()
	third := make(chan error, 1)
	go func() { _, err := l.Commit(t.Context(), step(l, "pay/c", 1, time.Time{}), 0); third <- err }()
	for len(l.queue) < 2 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-first; !errors.Is(err, credential.ErrUncertain) || !errors.Is(err, context.Canceled) {
		t.Errorf("left while it was under way: %v", err)
	}
	if err := <-second; errors.Is(err, credential.ErrUncertain) || !errors.Is(err, context.Canceled) {
		t.Errorf("left before it began: %v", err)
	}
	closed := make(chan struct{})
	go func() { l.Close(); close(closed) }()
	<-l.stop
	if _, err := l.Commit(t.Context(), step(l, "pay/d", 1, time.Time{}), 0); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}
	select {
	case <-closed:
		t.Error("Close did not wait")
	default:
	}
	close(release)
	<-closed
	if err := <-third; err != nil {
		t.Errorf("accepted before Close: %v", err)
	}
	if len(arrived) != 1 { // b was never sent
		t.Errorf("%d more batches were sent, want 1", len(arrived))
	}
}

// A record that no server would take is refused before it can spoil a batch.
func TestOversizedRecord(t *testing.T) {
	l := opened(t, nil)
	r := step(l, "pay/orders", 1, time.Time{})
	r.Residue = strings.Repeat("x", 1<<20)
	_, err := l.Commit(t.Context(), r, 0)
	if err == nil || errors.Is(err, credential.ErrUncertain) || !strings.Contains(err.Error(), "the server takes") {
		t.Fatalf("got %v", err)
	}
}

// What cannot be seen from outside without cutting the power: every write is synced, and no limit refuses one while there is
// space.
func TestEmbeddedSyncs(t *testing.T) {
	e, err := StartEmbedded(EmbeddedConfig{DataDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Shutdown()
	if c := e.ns.JetStreamConfig(); !c.SyncAlways || c.MaxStore != unlimitedStore {
		t.Fatalf("SyncAlways %v, MaxStore %d", c.SyncAlways, c.MaxStore)
	}
}
