package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// Event is one published event, as CloudEvents' JSON format has it, and its place in the stream.
type Event struct {
	SpecVersion string      `json:"specversion"`
	ID          string      `json:"id"`
	Type        string      `json:"type"`
	Source      string      `json:"source"`
	Subject     string      `json:"subject"`
	Time        time.Time   `json:"time"`
	Data        events.Data `json:"data"`
	Sequence    uint64      `json:"sequence"`
}

// AuditEntry is one audit entry and its place in the stream.
type AuditEntry struct {
	Sequence uint64 `json:"sequence"`
	credential.Entry
}

// streamError is the last line of a stream that broke off.
type streamError struct {
	Error string `json:"error"`
}

type (
	// StreamParams select events or audit entries.
	StreamParams struct {
		Since      string `query:"since" doc:"An instant (RFC 3339) or an age, such as 24h or 7d; absent: everything that is kept"`
		After      uint64 `query:"after" doc:"Only what is behind this sequence"`
		Credential string `query:"credential" doc:"Only this one, team/name"`
		Team       string `query:"team"`
		Follow     bool   `query:"follow" doc:"Go on with what comes later; an empty line every 15 s shows that the stream is alive"`
	}
	eventsInput struct {
		StreamParams
		Type string `query:"type" doc:"Only these types, joined by commas: rotated, or dev.rekey.credential.rotated.v1"`
	}
)

func (s *Server) registerStreams() {
	n := need{scopes: []Scope{ScopeRead}, lane: laneStream}
	lines := func(op huma.Operation, line string) huma.Operation {
		op.Responses = map[string]*huma.Response{"200": {
			Description: "One JSON object per line: " + line + ". A last line with only the member error says that the stream broke off.",
			Content:     map[string]*huma.MediaType{"application/x-ndjson": {}},
		}}
		return op
	}
	add(s, lines(operation(http.MethodGet, "/v1/events", "events", "Stream events", n), "an event"), s.events)
	add(s, lines(operation(http.MethodGet, "/v1/audit", "audit", "Stream audit entries", n), "an audit entry"), s.audit)
	add(s, operation(http.MethodGet, "/v1/audit/verify", "verify-audit", "Check every audit entry, record and event against each other",
		need{scopes: []Scope{ScopeRead}, long: true}), s.verify)
}

// query turns parameters into a ledger's query, and what an identity may see of the result.
func (s *Server) query(ctx context.Context, in StreamParams) (ledger.Query, func(team string) bool, error) {
	me := who(ctx)
	q := ledger.Query{Team: in.Team, After: in.After, Follow: in.Follow}
	if in.Credential != "" {
		id, err := credential.ParseID(in.Credential)
		if err != nil {
			return q, nil, huma.Error422UnprocessableEntity(err.Error())
		}
		if in.Team != "" && in.Team != id.Team() {
			return q, nil, huma.Error422UnprocessableEntity("credential and team exclude each other")
		}
		q.Team, q.Name = id.Team(), id.Name()
	}
	if q.Team != "" && !validName(q.Team) {
		return q, nil, huma.Error422UnprocessableEntity(fmt.Sprintf("team %q: want the part of a credential's id before the slash", clip(q.Team)))
	}
	if q.Team != "" && !me.allows(q.Team) {
		return q, nil, huma.Error403Forbidden(fmt.Sprintf("identity %s is limited to %s", me.Name, joined(me.Teams)))
	}
	if in.Since != "" {
		var age credential.Duration
		if err := age.UnmarshalText([]byte(in.Since)); err == nil {
			q.Since = s.Now().Add(-age.D())
		} else if q.Since, err = time.Parse(time.RFC3339, in.Since); err != nil {
			return q, nil, huma.Error422UnprocessableEntity(fmt.Sprintf("since %q: want an instant such as 2030-01-02T15:04:05Z, or an age such as 24h or 7d", clip(in.Since)))
		}
	}
	return q, me.allows, nil
}

func eventTypes(list string) ([]string, error) {
	var types []string
	for word := range strings.SplitSeq(list, ",") {
		if word = strings.TrimSpace(word); word == "" {
			continue
		}
		i := slices.IndexFunc(events.Types(), func(t string) bool { return t == word || events.Short(t) == word })
		if i < 0 {
			var known []string
			for _, t := range events.Types() {
				known = append(known, events.Short(t))
			}
			return nil, huma.Error422UnprocessableEntity(fmt.Sprintf("event type %q: want one of %s", clip(word), strings.Join(known, ", ")))
		}
		types = append(types, events.Types()[i])
	}
	return types, nil
}

func (s *Server) events(ctx context.Context, in *eventsInput) (*huma.StreamResponse, error) {
	q, see, err := s.query(ctx, in.StreamParams)
	if err != nil {
		return nil, err
	}
	if q.Types, err = eventTypes(in.Type); err != nil {
		return nil, err
	}
	return s.stream(in.Follow, func(ctx context.Context, emit func(any) error) error {
		return s.Ledger.Events(ctx, q, func(e events.Event) error {
			if team, _, _ := strings.Cut(e.Subject, "/"); !see(team) {
				return nil
			}
			return emit(Event{"1.0", e.ID, e.Type, e.Source, e.Subject, e.Time, e.Data, e.Sequence})
		})
	}), nil
}

func (s *Server) audit(ctx context.Context, in *StreamParams) (*huma.StreamResponse, error) {
	q, see, err := s.query(ctx, *in)
	if err != nil {
		return nil, err
	}
	return s.stream(in.Follow, func(ctx context.Context, emit func(any) error) error {
		return s.Ledger.Audit(ctx, q, func(e credential.Entry, seq uint64) error {
			if !see(e.Credential.Team()) {
				return nil
			}
			return emit(AuditEntry{seq, e})
		})
	}), nil
}

const (
	heartbeat   = 15 * time.Second
	lineTimeout = 10 * time.Second // a client that takes longer for what it was sent is let go
	catchUpTime = 2 * time.Second
)

// errClientGone ends a stream whose client does not read.
var errClientGone = errors.New("the client does not read")

// stream writes what produce emits as one JSON object per line.
func (s *Server) stream(follow bool, produce func(context.Context, func(any) error) error) *huma.StreamResponse {
	return &huma.StreamResponse{Body: func(hc huma.Context) {
		r, w := humago.Unwrap(hc)
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(s.streams, cancel)()
		out := &lines{w: bufio.NewWriterSize(w, 32<<10), rc: http.NewResponseController(w), eager: follow}
		w.Header().Set("Content-Type", "application/x-ndjson")
		w.WriteHeader(http.StatusOK)
		if !follow { // what was committed before the request is in the answer
			caught, cancel := context.WithTimeout(ctx, catchUpTime)
			_ = s.Ledger.CatchUp(caught)
			cancel()
		} else {
			_ = out.beat() // the client learns that the stream is open
			go out.beats(ctx, cancel)
		}
		err := produce(ctx, out.emit)
		switch {
		case s.streams.Err() != nil && !follow:
			_ = out.emit(streamError{"the server is stopping"})
		case err == nil, ctx.Err() != nil, errors.Is(err, errClientGone):
		default:
			s.Logger.Error("stream broke off", "error", err)
			_ = out.emit(streamError{"the stream broke off: the server's log says why"})
		}
		_ = out.flush()
	}}
}

// lines writes lines to one client; every flush has a deadline.
type lines struct {
	mu    sync.Mutex
	w     *bufio.Writer
	rc    *http.ResponseController
	eager bool
}

func (l *lines) emit(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.w.Available() < len(b)+1 || l.w.Buffered() == 0 {
		l.extend()
	}
	_, err = l.w.Write(append(b, '\n'))
	if err == nil && l.eager {
		err = errors.Join(l.w.Flush(), l.rc.Flush())
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errClientGone, err)
	}
	return nil
}

func (l *lines) extend() { _ = l.rc.SetWriteDeadline(time.Now().Add(lineTimeout)) }

func (l *lines) beat() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.extend()
	_, err := l.w.WriteString("\n")
	return errors.Join(err, l.w.Flush(), l.rc.Flush())
}

// beats writes an empty line now and then, so that a dead client is noticed.
func (l *lines) beats(ctx context.Context, stop context.CancelFunc) {
	t := time.NewTicker(heartbeat)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if l.beat() != nil {
				stop()
				return
			}
		}
	}
}

func (l *lines) flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.extend()
	return errors.Join(l.w.Flush(), l.rc.Flush())
}
