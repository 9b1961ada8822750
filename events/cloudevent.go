package events

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// The headers of an event in binary mode (CloudEvents NATS Protocol Binding 1.0.3, "Binary Content Mode"). They are
// written as here and read in any case.
const (
	headerSpecVersion = "ce-specversion"
	headerID          = "ce-id"
	headerType        = "ce-type"
	headerSource      = "ce-source"
	headerSubject     = "ce-subject"
	headerTime        = "ce-time"
	headerContentType = "content-type"
)

const contentType = "application/json"

// Encode writes e as a message's headers and body. Sequence is not written: the stream assigns it. The headers hold the
// attributes and the content type only; a publisher adds Nats-Msg-Id itself. Every problem of e is reported, joined.
func Encode(e Event) (nats.Header, []byte, error) {
	var errs []error
	h := nats.Header{headerSpecVersion: {"1.0"}, headerContentType: {contentType}}
	for _, a := range [...]struct{ header, value string }{
		{headerID, e.ID}, {headerType, e.Type}, {headerSource, e.Source}, {headerSubject, e.Subject},
	} {
		if !plain(a.value) {
			errs = append(errs, fmt.Errorf("%s %q: want printable ASCII without spaces and %%", a.header, a.value))
		}
		h[a.header] = []string{a.value}
	}
	if !validID(e.Subject) {
		errs = append(errs, fmt.Errorf("subject %q: want a credential's id, team/name", e.Subject))
	}
	if e.Subject != e.Data.Credential {
		errs = append(errs, fmt.Errorf("subject %q and the data's credential %q differ", e.Subject, e.Data.Credential))
	}
	if e.Time.IsZero() {
		errs = append(errs, errors.New("time is missing"))
	}
	h[headerTime] = []string{e.Time.UTC().Format(time.RFC3339Nano)}
	body, err := json.Marshal(e.Data)
	if err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return nil, nil, fmt.Errorf("encode event: %w", errors.Join(errs...))
	}
	return h, body, nil
}

// Decode reads what Encode wrote. Unknown headers, types and fields of the data are ignored, so that an older reader
// understands a newer writer. Sequence stays 0.
func Decode(h nats.Header, body []byte) (Event, error) {
	attrs := make(map[string]string, len(h))
	for k, v := range h {
		if len(v) > 0 {
			attrs[strings.ToLower(k)] = v[0]
		}
	}
	var errs []error
	attr := func(name string) string {
		raw, ok := attrs[name]
		s, err := url.PathUnescape(raw)
		if !ok || s == "" || err != nil {
			errs = append(errs, fmt.Errorf("header %s is missing or malformed", name))
		}
		return s
	}
	if v := attr(headerSpecVersion); v != "" && v != "1.0" {
		errs = append(errs, fmt.Errorf("CloudEvents version %q is not 1.0", v))
	}
	if mt, _, err := mime.ParseMediaType(attrs[headerContentType]); err != nil || mt != contentType {
		errs = append(errs, fmt.Errorf("content type %q is not %s", attrs[headerContentType], contentType))
	}
	e := Event{ID: attr(headerID), Type: attr(headerType), Source: attr(headerSource), Subject: attr(headerSubject)}
	if t := attr(headerTime); t != "" {
		var err error
		if e.Time, err = time.Parse(time.RFC3339Nano, t); err != nil {
			errs = append(errs, fmt.Errorf("header %s: %w", headerTime, err))
		}
	}
	if err := json.Unmarshal(body, &e.Data); err != nil {
		errs = append(errs, fmt.Errorf("data: %w", err))
	} else if e.Data.Credential != e.Subject {
		errs = append(errs, fmt.Errorf("subject %q and the data's credential %q differ", e.Subject, e.Data.Credential))
	}
	if len(errs) > 0 {
		return Event{}, fmt.Errorf("decode event: %w", errors.Join(errs...))
	}
	return e, nil
}

var segment = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$`)

func validID(s string) bool {
	team, name, ok := strings.Cut(s, "/")
	return ok && segment.MatchString(team) && segment.MatchString(name)
}

// plain reports whether s needs no percent-encoding in a header.
func plain(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' || s[i] == '%' {
			return false
		}
	}
	return s != ""
}
