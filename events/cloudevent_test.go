package events

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
)

func sample(credential string, rev uint64, typ string) Event {
	inc := uuid.MustParse("6f1c1f2e-0b1d-4c35-9e0a-0d6a3c1c2b11")
	return Event{
		ID: NewID(inc, credential, rev, typ), Type: typ, Source: "/rekey/" + inc.String(), Subject: credential,
		Time: time.Date(2026, 3, 4, 5, 6, 7, 891234567, time.UTC),
		Data: Data{
			Credential: credential, Generation: rev, Epoch: 1, Rev: rev, Owner: "orders team", Environment: "prod",
			Store: "files", Reference: "files:" + credential,
			ValidUntil: time.Date(2026, 3, 4, 6, 0, 0, 0, time.UTC), Lagging: []string{"api", "batch"},
		},
	}
}

func TestRoundTrip(t *testing.T) {
	for _, typ := range Types() {
		want := sample("orders/db", 7, typ)
		h, body, err := Encode(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(h, body)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
}

// The names on the wire are what consumers in other languages rely on.
func TestWireForm(t *testing.T) {
	e := sample("orders/db", 7, Rotated)
	h, body, err := Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	want := nats.Header{
		"ce-specversion": {"1.0"}, "ce-id": {e.ID}, "ce-type": {"dev.rekey.credential.rotated.v1"},
		"ce-source": {"/rekey/6f1c1f2e-0b1d-4c35-9e0a-0d6a3c1c2b11"}, "ce-subject": {"orders/db"},
		"ce-time": {"2026-03-04T05:06:07.891234567Z"}, "content-type": {"application/json"},
	}
	if !reflect.DeepEqual(h, want) {
		t.Errorf("headers %v, want %v", h, want)
	}
	wantBody := `{"credential":"orders/db","generation":7,"epoch":1,"rev":7,"owner":"orders team","environment":"prod","store":"files","reference":"files:orders/db","valid_until":"2026-03-04T06:00:00Z","lagging":["api","batch"]}`
	if string(body) != wantBody {
		t.Errorf("body %s", body)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Event)
		want   string
	}{
		"no id":              {func(e *Event) { e.ID = "" }, "ce-id"},
		"header injection":   {func(e *Event) { e.Source = "/rekey/x\r\nNats-Rollup: all" }, "ce-source"},
		"no type":            {func(e *Event) { e.Type = "" }, "ce-type"},
		"wildcard subject":   {func(e *Event) { e.Subject, e.Data.Credential = "orders/*", "orders/*" }, "team/name"},
		"no slash":           {func(e *Event) { e.Subject, e.Data.Credential = "orders", "orders" }, "team/name"},
		"other credential":   {func(e *Event) { e.Data.Credential = "orders/other" }, "differ"},
		"no time":            {func(e *Event) { e.Time = time.Time{} }, "time is missing"},
		"percent in an id":   {func(e *Event) { e.ID = "a%20b" }, "ce-id"},
		"non-ASCII source":   {func(e *Event) { e.Source = "/rekey/é" }, "ce-source"},
		"300 characters":     {func(e *Event) { s := "a/" + strings.Repeat("b", 300); e.Subject, e.Data.Credential = s, s }, "team/name"},
		"dots in an id":      {func(e *Event) { e.Subject, e.Data.Credential = "a.b/c", "a.b/c" }, "team/name"},
		"traversal in an id": {func(e *Event) { e.Subject, e.Data.Credential = "../c", "../c" }, "team/name"},
	} {
		t.Run(name, func(t *testing.T) {
			e := sample("orders/db", 7, Rotated)
			c.change(&e)
			if _, _, err := Encode(e); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

func TestDecodeIsLenientWhereItMayBe(t *testing.T) {
	e := sample("orders/db", 7, "dev.rekey.credential.shiny.v9")
	h, _, err := Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	odd := nats.Header{"X-Other": {"1"}, "ce-extension": {"2"}}
	for k, v := range h {
		odd[strings.ToUpper(k)] = v
	}
	odd["CE-SOURCE"] = []string{"/rekey/%C3%A9"}
	odd["CONTENT-TYPE"] = []string{"application/json; charset=utf-8"}
	got, err := Decode(odd, []byte(`{"credential":"orders/db","from_the_future":{"a":[1]}}`))
	if err != nil {
		t.Fatal(err)
	}
	if got.Type != e.Type || got.Source != "/rekey/é" || got.ID != e.ID || !got.Time.Equal(e.Time) {
		t.Errorf("got %+v", got)
	}
}

func TestDecodeRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(nats.Header)
		body   string
		want   string
	}{
		"no id":            {func(h nats.Header) { delete(h, "ce-id") }, "", "ce-id"},
		"other version":    {func(h nats.Header) { h["ce-specversion"] = []string{"0.3"} }, "", "not 1.0"},
		"no version":       {func(h nats.Header) { delete(h, "ce-specversion") }, "", "ce-specversion"},
		"no content type":  {func(h nats.Header) { delete(h, "content-type") }, "", "content type"},
		"structured mode":  {func(h nats.Header) { h["content-type"] = []string{"application/cloudevents+json"} }, "", "content type"},
		"bad time":         {func(h nats.Header) { h["ce-time"] = []string{"yesterday"} }, "", "ce-time"},
		"bad escape":       {func(h nats.Header) { h["ce-source"] = []string{"%zz"} }, "", "ce-source"},
		"not JSON":         {func(nats.Header) {}, "{", "data"},
		"other credential": {func(nats.Header) {}, `{"credential":"orders/other"}`, "differ"},
		"no headers":       {func(h nats.Header) { clear(h) }, "", "missing"},
	} {
		t.Run(name, func(t *testing.T) {
			h, body, err := Encode(sample("orders/db", 7, Rotated))
			if err != nil {
				t.Fatal(err)
			}
			if c.body != "" {
				body = []byte(c.body)
			}
			c.change(h)
			if _, err := Decode(h, body); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	h, body, err := Encode(sample("orders/db", 7, Rotated))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(h.Get("ce-id"), h.Get("ce-source"), h.Get("ce-subject"), h.Get("ce-time"), body)
	f.Fuzz(func(t *testing.T, id, source, subject, at string, body []byte) {
		e, err := Decode(nats.Header{
			"ce-specversion": {"1.0"}, "content-type": {"application/json"}, "ce-type": {Rotated},
			"ce-id": {id}, "ce-source": {source}, "ce-subject": {subject}, "ce-time": {at},
		}, body)
		if err == nil && (e.ID == "" || e.Subject != e.Data.Credential) {
			t.Errorf("accepted %+v", e)
		}
	})
}
