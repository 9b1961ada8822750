package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

// ClientConfig says where an API is and who asks. Address is required.
type ClientConfig struct {
	// Address is unix:/path, host:port on loopback, or https://host:port.
	Address string
	Token   string
	// TLS is for https; nil trusts the system's authorities.
	TLS *tls.Config
	// Timeout bounds one request, streams and Apply and Verify apart; 60 s if zero.
	Timeout time.Duration
}

// Client calls an API. It may be used by many goroutines.
type Client struct {
	base    string
	address string
	token   string
	timeout time.Duration
	http    *http.Client
}

// Error is an answer that is not a success, as the server explains it (RFC 9457).
type Error struct {
	Status int           `json:"status"`
	Title  string        `json:"title,omitempty"`
	Detail string        `json:"detail,omitempty"`
	Errors []ErrorDetail `json:"errors,omitempty"`
}

// ErrorDetail is one of several things that are wrong.
type ErrorDetail struct {
	Location string `json:"location,omitempty"`
	Message  string `json:"message"`
}

// Error is the detail and, a line each, what is wrong.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Detail)
	if e.Detail == "" {
		fmt.Fprintf(&b, "the server answered %d %s", e.Status, e.Title)
	}
	for _, d := range e.Errors {
		b.WriteString("\n  ")
		if d.Location != "" {
			b.WriteString(d.Location + ": ")
		}
		b.WriteString(d.Message)
	}
	return b.String()
}

// ErrUnreachable is wrapped by the error of a request that got no answer. A change may have been made all the same.
var ErrUnreachable = errors.New("the server did not answer")

// NewClient makes a client. It connects with the first request.
func NewClient(c ClientConfig) (*Client, error) {
	if c.Timeout == 0 {
		c.Timeout = time.Minute
	}
	transport := &http.Transport{
		// A connection for each request: a server under siege closes idle ones, and a request on one would fail in the dark.
		DisableKeepAlives: true, TLSClientConfig: c.TLS,
		TLSHandshakeTimeout: 5 * time.Second, DisableCompression: true,
	}
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	cl := &Client{address: c.Address, token: c.Token, timeout: c.Timeout}
	host, _, err := net.SplitHostPort(c.Address)
	switch {
	case strings.HasPrefix(c.Address, "unix:"):
		path := strings.TrimPrefix(c.Address, "unix:")
		cl.base = "http://rekey"
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", path) }
	case strings.HasPrefix(c.Address, "https://"):
		cl.base = strings.TrimSuffix(c.Address, "/")
	case err != nil:
		return nil, fmt.Errorf("server address %q: want unix:/path, host:port on loopback, or https://host:port", clip(c.Address))
	case !isLoopback(host):
		return nil, fmt.Errorf("server address %s is not loopback: the token would cross the network in the clear; use https://%s", c.Address, c.Address)
	default:
		cl.base = "http://" + c.Address
	}
	if cl.base != "http://rekey" {
		transport.DialContext = dialer.DialContext
	}
	cl.http = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return cl, nil
}

// Address is where the client connects.
func (c *Client) Address() string { return c.address }

// do sends one request and decodes the answer into out, if that is not nil.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, in, out any) error {
	res, err := c.send(ctx, method, path, query, in)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if out == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<20))
		return err
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, 256<<20)).Decode(out); err != nil {
		return fmt.Errorf("%w: read answer: %w", ErrUnreachable, err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, query url.Values, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	target := c.base + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return nil, err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	res, err := c.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		if ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w at %s: %w", ErrUnreachable, c.address, err)
	}
	if res.StatusCode < 300 {
		return res, nil
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	e := &Error{}
	if json.Unmarshal(b, e) != nil || e.Status == 0 {
		e = &Error{Detail: fmt.Sprintf("%s answered %s", c.address, res.Status)}
	}
	e.Status = res.StatusCode
	return nil, e
}

// short is do within the client's timeout.
func (c *Client) short(ctx context.Context, method, path string, query url.Values, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.do(ctx, method, path, query, in, out)
}

func credentialPath(id credential.ID, verb string) string {
	p := "/v1/credentials/" + url.PathEscape(id.Team()) + "/" + url.PathEscape(id.Name())
	if verb != "" {
		p += "/" + verb
	}
	return p
}

// Filter selects credentials; empty fields select all.
type Filter struct{ Team, Target, Owner, Environment, State string }

// List reads the whole inventory that fits, by id.
func (c *Client) List(ctx context.Context, f Filter) ([]Credential, error) {
	q := url.Values{}
	for name, value := range map[string]string{"team": f.Team, "target": f.Target, "owner": f.Owner, "environment": f.Environment, "state": f.State} {
		if value != "" {
			q.Set(name, value)
		}
	}
	all := []Credential{}
	for {
		var page CredentialList
		if err := c.short(ctx, http.MethodGet, "/v1/credentials", q, nil, &page); err != nil {
			return nil, err
		}
		all = append(all, page.Credentials...)
		if page.Next == "" {
			return all, nil
		}
		q.Set("after", page.Next)
	}
}

// Get reads one credential.
func (c *Client) Get(ctx context.Context, id credential.ID) (Credential, error) {
	var out Credential
	err := c.short(ctx, http.MethodGet, credentialPath(id, ""), nil, nil, &out)
	return out, err
}

// Steer asks for rotate, hold, rollback, pause, resume or restore, and returns the credential after it.
func (c *Client) Steer(ctx context.Context, id credential.ID, verb credential.Verb, reason string) (Credential, error) {
	var out Credential
	err := c.short(ctx, http.MethodPost, credentialPath(id, string(verb)), nil, map[string]string{"reason": reason}, &out)
	return out, err
}

// Order gives an emergency order, kill or replace. Repeated with the same incident id it is the same order.
func (c *Client) Order(ctx context.Context, id credential.ID, mode, incident, reason string) (Incident, error) {
	body := map[string]string{"reason": reason}
	if incident != "" {
		body["incident"] = incident
	}
	var out Incident
	err := c.short(ctx, http.MethodPost, credentialPath(id, mode), nil, body, &out)
	return out, err
}

// Incident reads an emergency order and its progress.
func (c *Client) Incident(ctx context.Context, id string) (Incident, error) {
	var out Incident
	err := c.short(ctx, http.MethodGet, "/v1/incidents/"+url.PathEscape(id), nil, nil, &out)
	return out, err
}

// Control reads the fleet-wide pause.
func (c *Client) Control(ctx context.Context) (Control, error) {
	var out Control
	err := c.short(ctx, http.MethodGet, "/v1/control", nil, nil, &out)
	return out, err
}

// SetControl pauses or resumes the whole fleet.
func (c *Client) SetControl(ctx context.Context, paused bool, reason string) (Control, error) {
	var out Control
	err := c.short(ctx, http.MethodPost, "/v1/control", nil, map[string]any{"paused": paused, "reason": reason}, &out)
	return out, err
}

// Targets lists the targets by name.
func (c *Client) Targets(ctx context.Context) ([]Target, error) {
	var out struct{ Targets []Target }
	err := c.short(ctx, http.MethodGet, "/v1/targets", nil, nil, &out)
	return out.Targets, err
}

// Apply declares targets and credentials. It ends with ctx only: a large one takes its time.
func (c *Client) Apply(ctx context.Context, q ApplyRequest) (ApplyResult, error) {
	if q.Credentials == nil {
		q.Credentials = map[credential.ID]credential.Spec{}
	}
	var out ApplyResult
	err := c.do(ctx, http.MethodPost, "/v1/apply", nil, q, &out)
	return out, err
}

// Verify checks audit entries, records and events against each other. It ends with ctx only.
func (c *Client) Verify(ctx context.Context) (VerifyResult, error) {
	var out VerifyResult
	err := c.do(ctx, http.MethodGet, "/v1/audit/verify", nil, nil, &out)
	return out, err
}

// Identities lists the identities by name.
func (c *Client) Identities(ctx context.Context) ([]IdentityView, error) {
	var out struct{ Identities []IdentityView }
	err := c.short(ctx, http.MethodGet, "/v1/identities", nil, nil, &out)
	return out.Identities, err
}

// AddIdentity adds an identity whose token the caller has drawn; see NewToken.
func (c *Client) AddIdentity(ctx context.Context, i NewIdentity) (IdentityView, error) {
	var out IdentityView
	err := c.short(ctx, http.MethodPost, "/v1/identities", nil, i, &out)
	return out, err
}

// RemoveIdentity ends an identity at once.
func (c *Client) RemoveIdentity(ctx context.Context, name string) error {
	return c.short(ctx, http.MethodDelete, "/v1/identities/"+url.PathEscape(name), nil, nil, nil)
}

// Ready reports readiness; a server that is not ready is no error.
func (c *Client) Ready(ctx context.Context) (Readiness, error) {
	var out Readiness
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+"/readyz", nil)
	if err != nil {
		return out, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return out, fmt.Errorf("%w at %s: %w", ErrUnreachable, c.address, err)
	}
	defer res.Body.Close()
	return out, json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&out)
}

// StreamQuery selects events or audit entries. The zero value is everything that is kept.
type StreamQuery struct {
	Since      string   // an instant (RFC 3339) or an age
	After      uint64   // a sequence
	Credential string   // team/name
	Team       string   //
	Types      []string // events only
	Follow     bool
}

func (q StreamQuery) values() url.Values {
	v := url.Values{}
	for name, value := range map[string]string{"since": q.Since, "credential": q.Credential, "team": q.Team, "type": strings.Join(q.Types, ",")} {
		if value != "" {
			v.Set(name, value)
		}
	}
	if q.After > 0 {
		v.Set("after", strconv.FormatUint(q.After, 10))
	}
	if q.Follow {
		v.Set("follow", "true")
	}
	return v
}

// Events calls fn with each event that q selects, in order. A stream that follows goes on where it was after a lost connection,
// until ctx ends; then the error is ctx's. An error of fn ends it.
func (c *Client) Events(ctx context.Context, q StreamQuery, fn func(Event) error) error {
	return stream(ctx, c, "/v1/events", q, func(e Event) (uint64, error) { return e.Sequence, fn(e) })
}

// Audit is Events for audit entries.
func (c *Client) Audit(ctx context.Context, q StreamQuery, fn func(AuditEntry) error) error {
	return stream(ctx, c, "/v1/audit", q, func(e AuditEntry) (uint64, error) { return e.Sequence, fn(e) })
}

// reconnect is the wait before a lost stream is opened again.
const reconnect = time.Second

func stream[T any](ctx context.Context, c *Client, path string, q StreamQuery, fn func(T) (uint64, error)) error {
	for opened := false; ; {
		lost, err := streamOnce(ctx, c, path, &q, &opened, fn)
		if !lost || !q.Follow || !opened || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(reconnect):
		}
	}
}

// streamOnce reads one connection's lines. lost means that the connection ended, not the stream.
func streamOnce[T any](ctx context.Context, c *Client, path string, q *StreamQuery, opened *bool, fn func(T) (uint64, error)) (lost bool, err error) {
	res, err := c.send(ctx, http.MethodGet, path, q.values(), nil)
	if err != nil {
		var answer *Error
		return !errors.As(err, &answer), err
	}
	defer res.Body.Close()
	*opened = true
	in := bufio.NewScanner(res.Body)
	in.Buffer(nil, 4<<20)
	for in.Scan() {
		line := bytes.TrimSpace(in.Bytes())
		if len(line) == 0 {
			continue
		}
		var broken streamError
		if json.Unmarshal(line, &broken) == nil && broken.Error != "" {
			return true, errors.New(broken.Error)
		}
		var v T
		if err := json.Unmarshal(line, &v); err != nil {
			return false, fmt.Errorf("read stream: %w", err)
		}
		seq, err := fn(v)
		if err != nil {
			return false, err
		}
		if q.After = seq; q.After > 0 {
			q.Since = ""
		}
	}
	if err := in.Err(); err != nil {
		return true, fmt.Errorf("%w: the stream ended: %w", ErrUnreachable, err)
	}
	return true, nil
}
