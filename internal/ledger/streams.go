package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
)

// Schema is the version of the ledger's layout that this build reads and writes.
const Schema = 1

// canary is read back at each start: a ledger that cannot show it was damaged or is not one.
const canary = "rekey ledger: the truth"

// meta is the first thing written to a new ledger. Ready is false until every stream exists.
type meta struct {
	Schema      int       `json:"schema"`
	Incarnation uuid.UUID `json:"incarnation"`
	Canary      string    `json:"canary"`
	Ready       bool      `json:"ready"`
	CreatedAt   time.Time `json:"created_at"`
}

const day = 24 * time.Hour

// ledgerConfig has no MaxAge, MaxBytes or MaxMsgs: they would delete records silently. Purging stays allowed because the
// server needs it to replace a schedule.
func ledgerConfig(replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:               LedgerStream,
		Description:        "rekey: records, and the events, audit entries and schedules committed with them",
		Subjects:           []string{kv + ">"},
		Storage:            jetstream.FileStorage,
		Retention:          jetstream.LimitsPolicy,
		Discard:            jetstream.DiscardOld, // DiscardNew is refused together with schedules
		MaxMsgsPerSubject:  1,
		MaxMsgs:            -1,
		MaxBytes:           -1,
		Replicas:           replicas,
		Duplicates:         2 * time.Minute,
		DenyDelete:         true,
		AllowRollup:        true,
		AllowDirect:        replicas == 1, // a follower may answer direct reads with the past
		AllowAtomicPublish: true,
		AllowMsgSchedules:  true,
		AllowMsgTTL:        true,
	}
}

func sourcedConfig(name, description, from, to string, maxAge time.Duration, replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: name, Description: description,
		Storage: jetstream.FileStorage, Retention: jetstream.LimitsPolicy,
		MaxMsgs: -1, MaxBytes: -1, MaxAge: maxAge, Replicas: replicas, DenyDelete: true, DenyPurge: true,
		Sources: []*jetstream.StreamSource{{
			Name:              LedgerStream,
			SubjectTransforms: []jetstream.SubjectTransformConfig{{Source: from, Destination: to}},
		}},
	}
}

// sourced is the configuration of one of the two streams that follow the ledger; the transforms drop the Rev.
func sourced(name string, replicas int) (jetstream.StreamConfig, bool) {
	switch name {
	case EventStream:
		return sourcedConfig(name, "rekey: events for application teams",
			eventPrefix+"*.*.*.*", events.SubjectPrefix+"{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}", 90*day, replicas), true
	case AuditStream:
		return sourcedConfig(name, "rekey: audit entries",
			auditPrefix+"*.*.*", auditOutPrefix+"{{wildcard(1)}}.{{wildcard(2)}}", 365*day, replicas), true
	default:
		return jetstream.StreamConfig{}, false
	}
}

// workConfig keeps doorbells only as long as several sweeps take to ring again, and writes them lazily where it may.
func workConfig(replicas int) jetstream.StreamConfig {
	cfg := jetstream.StreamConfig{
		Name: WorkStream, Description: "rekey: doorbells; losing them loses nothing",
		Subjects: []string{rekeyPrefix + string(credential.LaneWork) + ".>", rekeyPrefix + string(credential.LaneRevoke) + ".>"},
		Storage:  jetstream.FileStorage, Retention: jetstream.WorkQueuePolicy,
		MaxMsgs: -1, MaxBytes: -1, MaxAge: time.Hour, Replicas: replicas, Duplicates: doorbellWindow,
	}
	if replicas == 1 {
		cfg.PersistMode = jetstream.AsyncPersistMode
	}
	return cfg
}

// ackConfig keeps consumers' acknowledgements until a worker has committed them.
func ackConfig(replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: AckStream, Description: "rekey: acknowledgements of consumers, until they are committed",
		Subjects: []string{ackPrefix + "*.*.*"},
		Storage:  jetstream.FileStorage, Retention: jetstream.WorkQueuePolicy,
		MaxMsgs: -1, MaxBytes: -1, MaxAge: 7 * day, MaxMsgSize: 64 << 10, MaxMsgsPerSubject: 16, Replicas: replicas,
	}
}

// checkServer refuses a server that cannot commit atomically.
func checkServer(nc *nats.Conn) error {
	v := nc.ConnectedServerVersion()
	if v == "" {
		return errors.New("not connected to a NATS server")
	}
	major, minor, ok := parseVersion(v)
	if !ok {
		return fmt.Errorf("NATS server has the unknown version %q: rekey needs 2.12 or newer", v)
	}
	if major < 2 || major == 2 && minor < 12 {
		return fmt.Errorf("NATS server is version %s: rekey needs 2.12 or newer, for atomic batches and scheduled messages", v)
	}
	return nil
}

func parseVersion(v string) (major, minor int, ok bool) {
	parts := strings.SplitN(strings.TrimPrefix(v, "v"), ".", 3)
	if len(parts) < 2 {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return major, minor, err1 == nil && err2 == nil
}

// bind finds the ledger, or creates it in an empty account.
func (l *Ledger) bind(ctx context.Context) error {
	present, err := l.streams(ctx)
	if err != nil {
		return err
	}
	if !present[LedgerStream] {
		for name := range present {
			return fmt.Errorf("stream %s exists but %s does not: the ledger was lost or could not be read; restore its data, or recover under a new incarnation in an empty account", name, LedgerStream)
		}
		if _, err := l.js.CreateStream(ctx, ledgerConfig(l.cfg.Replicas)); err != nil {
			return fmt.Errorf("create stream %s: %w", LedgerStream, err)
		}
	}
	if l.stream, err = l.js.Stream(ctx, LedgerStream); err != nil {
		return fmt.Errorf("bind stream %s: %w", LedgerStream, err)
	}
	info := l.stream.CachedInfo()
	if err := checkLedger(info.Config); err != nil {
		return err
	}
	replicas := info.Config.Replicas
	seq, err := l.readMeta(ctx, info.State.LastSeq == 0)
	if err != nil {
		return err
	}
	if err := l.checkMeta(); err != nil {
		return err
	}
	if present, err = l.streams(ctx); err != nil { // again: another process may have completed the creation meanwhile
		return err
	}
	for _, name := range []string{EventStream, AuditStream} {
		if err := l.bindSourced(ctx, name, present[name], replicas); err != nil {
			return err
		}
	}
	for _, cfg := range []jetstream.StreamConfig{workConfig(replicas), ackConfig(replicas)} {
		if present[cfg.Name] {
			continue
		}
		if l.meta.Ready {
			l.log.Warn("stream recreated", "stream", cfg.Name)
		}
		if _, err := l.js.CreateStream(ctx, cfg); err != nil {
			return fmt.Errorf("create stream %s: %w", cfg.Name, err)
		}
	}
	if err := l.ensureConsumers(ctx); err != nil {
		return err
	}
	if !l.meta.Ready {
		l.meta.Ready = true
		if _, err := l.put(ctx, metaSubject, l.meta, seq); err != nil && !errors.Is(err, credential.ErrStale) {
			return fmt.Errorf("write the ledger's identity: %w", err) // stale: another process completed it
		}
	}
	return nil
}

// bindSourced makes a stream that follows the ledger, during the first Open only, or adds the source that it lost.
func (l *Ledger) bindSourced(ctx context.Context, name string, present bool, replicas int) error {
	cfg, _ := sourced(name, replicas)
	if !present {
		if l.meta.Ready {
			return fmt.Errorf("stream %s is missing: it was deleted or could not be read; restore its data before starting", name)
		}
		if _, err := l.js.CreateStream(ctx, cfg); err != nil {
			return fmt.Errorf("create stream %s: %w", name, err)
		}
		return nil
	}
	s, err := l.js.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("bind stream %s: %w", name, err)
	}
	if now := s.CachedInfo().Config; len(now.Sources) == 0 { // a restart of the source was interrupted
		return l.addSource(ctx, now, cfg.Sources[0])
	}
	return nil
}

// streams lists which of our streams the account holds.
func (l *Ledger) streams(ctx context.Context) (map[string]bool, error) {
	present := map[string]bool{}
	names := l.js.StreamNames(ctx)
	for name := range names.Name() {
		switch name {
		case LedgerStream, EventStream, AuditStream, WorkStream, AckStream:
			present[name] = true
		}
	}
	if err := names.Err(); err != nil {
		if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
			return nil, fmt.Errorf("the NATS server offers no JetStream to this account: %w", err)
		}
		return nil, fmt.Errorf("list streams: %w", err)
	}
	return present, nil
}

// checkLedger refuses a stream whose configuration would lose records or cannot commit.
func checkLedger(c jetstream.StreamConfig) error {
	var errs []error
	must := func(ok bool, problem string) {
		if !ok {
			errs = append(errs, fmt.Errorf("stream %s: %s", LedgerStream, problem))
		}
	}
	must(len(c.Subjects) == 1 && c.Subjects[0] == kv+">", "does not hold exactly the subjects "+kv+">")
	must(c.Storage == jetstream.FileStorage, "is not stored in files")
	must(c.Retention == jetstream.LimitsPolicy, "does not keep messages by limits")
	must(c.MaxMsgsPerSubject == 1, "does not keep exactly the last message per subject")
	must(c.MaxAge == 0 && c.MaxBytes <= 0 && c.MaxMsgs <= 0, "has a limit on age, bytes or messages, which would delete records")
	must(c.AllowAtomicPublish, "does not allow atomic batches")
	must(c.AllowMsgSchedules && c.AllowRollup, "does not allow scheduled messages")
	must(c.AllowMsgTTL, "does not allow a time to live per message")
	must(c.DenyDelete, "allows messages to be deleted")
	return errors.Join(errs...)
}

// How long the first write to a new stream is tried, and how often.
const (
	firstWriteWait  = 10 * time.Second
	firstWritePause = 100 * time.Millisecond
)

// readMeta loads the ledger's identity into l.meta and returns its sequence. Only an empty stream gets a new one.
func (l *Ledger) readMeta(ctx context.Context, empty bool) (uint64, error) {
	m, seq, err := get[meta](ctx, l, metaSubject)
	switch {
	case err == nil:
		l.meta = m
		return seq, nil
	case !errors.Is(err, credential.ErrNotFound):
		return 0, fmt.Errorf("read the ledger's identity: %w", err)
	case !empty:
		return 0, fmt.Errorf("stream %s holds data but not the ledger's identity (%s): it is damaged or not rekey's", LedgerStream, metaSubject)
	}
	incarnation := l.cfg.Incarnation
	if incarnation == uuid.Nil {
		incarnation = uuid.New()
	}
	m = meta{Schema: Schema, Incarnation: incarnation, Canary: canary, CreatedAt: l.cfg.Now().UTC()}
	seq, err = l.put(ctx, metaSubject, m, 0)
	for deadline := time.Now().Add(firstWriteWait); neverSent(err) && time.Now().Before(deadline) && ctx.Err() == nil; {
		time.Sleep(firstWritePause) // a new stream of a cluster answers only once it has a leader
		seq, err = l.put(ctx, metaSubject, m, 0)
	}
	if errors.Is(err, credential.ErrStale) { // another process was first
		l.meta, seq, err = get[meta](ctx, l, metaSubject)
		return seq, err
	}
	if err != nil {
		return 0, fmt.Errorf("write the ledger's identity: %w", err)
	}
	l.meta = m
	return seq, nil
}

func (l *Ledger) checkMeta() error {
	switch {
	case l.meta.Schema > Schema:
		return fmt.Errorf("the ledger's layout is version %d, this build knows %d: %w", l.meta.Schema, Schema, credential.ErrSchema)
	case l.meta.Canary != canary || l.meta.Incarnation == uuid.Nil:
		return fmt.Errorf("the ledger's canary is damaged: %s does not hold what was written at its creation", metaSubject)
	case l.cfg.Incarnation != uuid.Nil && l.cfg.Incarnation != l.meta.Incarnation:
		return fmt.Errorf("the ledger's incarnation is %s, expected %s: this is another ledger", l.meta.Incarnation, l.cfg.Incarnation)
	}
	return nil
}

// ensureConsumers makes the shared consumers of due schedules and acknowledgements.
func (l *Ledger) ensureConsumers(ctx context.Context) error {
	for _, c := range []struct {
		stream string
		cfg    jetstream.ConsumerConfig
	}{
		{LedgerStream, jetstream.ConsumerConfig{Durable: dueConsumer, FilterSubject: duePrefix + "*.*", MaxAckPending: 1024}},
		{AckStream, jetstream.ConsumerConfig{Durable: ackConsumer, FilterSubject: ackPrefix + "*.*.*", MaxAckPending: 1024}},
	} {
		c.cfg.AckPolicy, c.cfg.AckWait, c.cfg.MaxDeliver = jetstream.AckExplicitPolicy, l.ackWait, -1
		if _, err := l.js.CreateOrUpdateConsumer(ctx, c.stream, c.cfg); err != nil {
			return fmt.Errorf("create consumer %s of %s: %w", c.cfg.Durable, c.stream, err)
		}
	}
	return nil
}

// Check commits and reads back a probe, so that a full disk or a lost server is noticed before a commit meets it. It costs one
// synced batch.
func (l *Ledger) Check(ctx context.Context) error {
	data, err := json.Marshal(l.cfg.Now().UTC())
	if err != nil {
		return err
	}
	if _, err := l.publish([]*nats.Msg{{Subject: probeSubject, Header: nats.Header{}, Data: data}}); err != nil {
		return fmt.Errorf("the ledger takes no commits: %w", err)
	}
	if _, _, err := get[time.Time](ctx, l, probeSubject); err != nil {
		return fmt.Errorf("the ledger cannot be read: %w", err)
	}
	return nil
}

func decode[T any](data []byte) (T, error) {
	var v T
	err := json.Unmarshal(data, &v)
	return v, err
}
