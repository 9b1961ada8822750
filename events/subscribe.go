package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Options say how to subscribe. Only Durable is required.
type Options struct {
	// Durable names the subscription on the server, which keeps its position: 1 to 63 characters a-z 0-9 _ -. Several
	// processes that use the same name share the events.
	Durable string
	// Since and All say where a new Durable begins; zero means with the next event. One that exists goes on where it was.
	Since Since
	All   bool // with the oldest event that is retained
	// AckWait is how long after a process died the event that it was handling is delivered again; 0 means 30 s. While a handler
	// runs it is extended.
	AckWait time.Duration
	// Backoff is the wait before try number n+1 after n failures; nil means 1 s, doubling up to 1 min.
	Backoff func(n int) time.Duration
	// MaxAttempts skips an event after that many failures and logs it; 0 tries for ever.
	MaxAttempts int
	// Log receives what goes wrong; nil means slog.Default().
	Log *slog.Logger

	// grace is how long a stream that was there may be missing, as while a cluster restarts; 0 means 30 s.
	grace time.Duration
}

// Validate returns every problem of o, joined.
func (o Options) Validate() error {
	var errs []error
	if !segment.MatchString(o.Durable) {
		errs = append(errs, fmt.Errorf("durable %q: want 1 to 63 characters a-z 0-9 _ - that begins and ends with a letter or digit", o.Durable))
	}
	if o.All && o.Since != (Since{}) {
		errs = append(errs, errors.New("all and since are both set, want one of them"))
	}
	if o.AckWait != 0 && o.AckWait < 100*time.Millisecond || o.MaxAttempts < 0 {
		errs = append(errs, errors.New("ackwait is below 100ms, or maxattempts below 0"))
	}
	return errors.Join(append(errs, o.Since.validate())...)
}

// What the stalls of pull consumers taught: a pull is short, and a silent server is noticed.
const (
	pullExpiry    = 5 * time.Second
	pullHeartbeat = time.Second
	remembered    = 4096 // ids of handled events, per subscription
)

// Subscribe calls handler for every event that f selects, one at a time and in the stream's order, until ctx ends. An
// event is done when handler returns nil; otherwise it is delivered again after a wait, and later ones wait behind it, so
// that a credential's events are never seen out of order, not even by another process of the same Durable.
//
// Delivery is at least once: a process that dies between handling and acknowledging sees the event again. Within one call an
// id that was handled is not handled again. A message that is no event is logged and skipped.
//
// Lost connections are for nats.go to restore; give nc nats.MaxReconnects(-1). Subscribe returns ctx's error, or
// sooner what cannot heal: a bad argument, no such stream, no permission, a closed connection.
func Subscribe(ctx context.Context, nc *nats.Conn, f Filter, o Options, handler func(ctx context.Context, e Event) error) error {
	if err := errors.Join(f.Validate(), o.Validate()); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	o = o.filled()
	s := &subscription{
		nc: nc, js: js, subjects: f.subjects(), opts: o, handler: handler,
		seen: newRecent(remembered), log: o.Log.With("durable", o.Durable),
	}
	if err := s.run(ctx); ctx.Err() == nil {
		return fmt.Errorf("subscribe %s: %w", o.Durable, err)
	}
	return ctx.Err()
}

func (o Options) filled() Options {
	if o.AckWait == 0 {
		o.AckWait = 30 * time.Second
	}
	if o.Backoff == nil {
		o.Backoff = func(n int) time.Duration { return min(time.Second<<min(n-1, 10), time.Minute) }
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.grace == 0 {
		o.grace = 30 * time.Second
	}
	return o
}

type subscription struct {
	nc       *nats.Conn
	js       jetstream.JetStream
	subjects []string
	opts     Options
	handler  func(ctx context.Context, e Event) error
	seen     *recent
	log      *slog.Logger
	last     uint64 // sequence of the last message that was done
}

// permanent marks an error that no waiting heals.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// run finds or makes the durable and works through it, again and again, until ctx ends or something permanent happens.
func (s *subscription) run(ctx context.Context) error {
	var found bool            // the stream has been there
	var missing time.Duration // for how long it has not been there
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		consumer, err := s.consumer(ctx)
		if err == nil {
			found, missing, wait = true, 0, 100*time.Millisecond
			err = s.consume(ctx, consumer)
		}
		var p permanent
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &p):
			return p.error
		case absent(err):
			if missing += wait; !found || missing > s.opts.grace {
				return fmt.Errorf("there is no stream %s here: connect to rekey's server and account: %w", Stream, err)
			}
		}
		s.log.WarnContext(ctx, "event subscription interrupted", "error", err)
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

// consumer binds to the durable and makes it if it is missing. A position that exists is never moved.
func (s *subscription) consumer(ctx context.Context) (jetstream.Consumer, error) {
	ctx, cancel := context.WithTimeout(ctx, pullExpiry)
	defer cancel()
	c := jetstream.ConsumerConfig{
		Durable: s.opts.Durable, FilterSubjects: s.subjects, AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: s.opts.AckWait, MaxAckPending: 1, // order, see Subscribe
	}
	if len(s.subjects) == 1 { // only then the request's subject names it, and permissions can allow just that
		c.FilterSubject, c.FilterSubjects = s.subjects[0], nil
	}
	var consumer jetstream.Consumer
	was, err := s.js.Consumer(ctx, Stream, s.opts.Durable)
	switch {
	case err == nil:
		old := was.CachedInfo().Config
		c.DeliverPolicy, c.OptStartSeq, c.OptStartTime = old.DeliverPolicy, old.OptStartSeq, old.OptStartTime
		consumer, err = s.js.UpdateConsumer(ctx, Stream, c)
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		since := s.opts.Since
		if s.last != 0 { // somebody deleted it: go on where we were
			since = Since{Sequence: s.last + 1}
		}
		otherwise := jetstream.DeliverNewPolicy
		if s.opts.All {
			otherwise = jetstream.DeliverAllPolicy
		}
		c.DeliverPolicy, c.OptStartSeq, c.OptStartTime = since.policy(otherwise)
		consumer, err = s.js.CreateConsumer(ctx, Stream, c)
	}
	return consumer, explain(s.nc, err)
}

// consume handles one message after the other. It returns when pulling fails.
func (s *subscription) consume(ctx context.Context, c jetstream.Consumer) error {
	for {
		pull, cancel := context.WithTimeout(ctx, pullExpiry)
		batch, err := c.Fetch(1, jetstream.FetchContext(pull), jetstream.FetchHeartbeat(pullHeartbeat))
		if err == nil {
			for msg := range batch.Messages() {
				s.handle(ctx, msg)
			}
			err = batch.Error()
		}
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, nats.ErrTimeout) {
			return explain(s.nc, err)
		}
	}
}

// handle gives one message to the handler and tells the server how it went.
func (s *subscription) handle(ctx context.Context, msg jetstream.Msg) {
	e, meta, err := decodeMessage(msg)
	done := func() {
		if meta != nil {
			s.last = meta.Sequence.Stream
		}
		if err := msg.Ack(); err != nil { // it comes again and is known then
			s.log.WarnContext(ctx, "event not acknowledged", "event", e.ID, "error", err)
		}
	}
	if err != nil {
		s.log.ErrorContext(ctx, "message skipped: it is not an event", "subject", msg.Subject(), "error", err)
		done()
		return
	}
	if s.seen.has(e.ID) {
		done()
		return
	}
	if ctx.Err() != nil {
		_ = msg.Nak() // another process may have it at once
		return
	}
	err = s.callHandler(ctx, msg, e)
	attempt := int(min(meta.NumDelivered, 1<<20))
	switch {
	case err == nil:
		s.seen.add(e.ID)
		done()
	case ctx.Err() != nil:
		_ = msg.Nak()
	case s.opts.MaxAttempts > 0 && attempt >= s.opts.MaxAttempts:
		s.log.ErrorContext(ctx, "event skipped: the handler failed too often", "event", e.ID, "credential", e.Subject, "attempt", attempt, "error", err)
		done()
	default:
		wait := s.opts.Backoff(attempt)
		s.log.WarnContext(ctx, "event handler failed", "event", e.ID, "credential", e.Subject, "attempt", attempt, "retry_in", wait, "error", err)
		if err := msg.NakWithDelay(wait); err != nil {
			s.log.WarnContext(ctx, "event not handed back", "event", e.ID, "error", err)
		}
	}
}

// callHandler keeps the message ours while the handler runs.
func (s *subscription) callHandler(ctx context.Context, msg jetstream.Msg, e Event) error {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(s.opts.AckWait / 3)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = msg.InProgress() // a failure shows as a redelivery, which is known by its id
			case <-stop:
				return
			}
		}
	}()
	defer func() {
		close(stop)
		<-stopped
	}()
	return s.handler(ctx, e)
}

// decodeMessage also refuses an event on another credential's subject: a publisher with rights to one subject must not
// speak for another. Of a message without metadata it returns none.
func decodeMessage(msg jetstream.Msg) (Event, *jetstream.MsgMetadata, error) {
	meta, err := msg.Metadata()
	if err != nil {
		return Event{}, nil, err
	}
	e, err := Decode(msg.Headers(), msg.Data())
	if err != nil {
		return Event{}, meta, err
	}
	if !strings.HasSuffix(msg.Subject(), "."+strings.Replace(e.Subject, "/", ".", 1)) {
		return Event{}, meta, fmt.Errorf("an event of %q came on %s", e.Subject, msg.Subject())
	}
	e.Sequence = meta.Sequence.Stream
	return e, meta, nil
}

var apiDenied = regexp.MustCompile(`(?i)publish to "\$JS\.[^"]*` + Stream)

// explain marks what cannot heal. A server does not answer a request that is not permitted; nats.go learns why on the side.
func explain(nc *nats.Conn, err error) error {
	if err == nil {
		return nil
	}
	var api *jetstream.APIError
	switch denied := nc.LastError(); {
	case nc.IsClosed(), errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, jetstream.ErrConnectionClosed):
		return permanent{fmt.Errorf("the connection is closed: %w", err)}
	case absent(err):
		return err
	case errors.Is(denied, nats.ErrPermissionViolation) && apiDenied.MatchString(denied.Error()):
		return permanent{fmt.Errorf("this NATS user may not read %s: %w", Stream, denied)}
	case errors.As(err, &api) && api.Code >= 400 && api.Code < 500 && !errors.Is(err, jetstream.ErrConsumerNotFound) && api.Code != 408 && api.Code != 409 && api.Code != 429:
		return permanent{err}
	}
	return err
}

// absent reports whether there is no stream or no JetStream at all.
func absent(err error) bool {
	for _, e := range []error{jetstream.ErrStreamNotFound, jetstream.ErrJetStreamNotEnabled, jetstream.ErrJetStreamNotEnabledForAccount, nats.ErrNoResponders} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// recent remembers the last n ids.
type recent struct {
	ids  map[string]struct{}
	ring []string
	next int
}

func newRecent(n int) *recent {
	return &recent{ids: make(map[string]struct{}, n), ring: make([]string, n)}
}

func (r *recent) has(id string) bool { _, ok := r.ids[id]; return ok }

func (r *recent) add(id string) {
	delete(r.ids, r.ring[r.next])
	r.ids[id], r.ring[r.next] = struct{}{}, id
	r.next = (r.next + 1) % len(r.ring)
}
