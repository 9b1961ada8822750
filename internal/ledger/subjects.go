package ledger

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
)

// The names of the streams. Bucket is the name that the KV API and `nats kv` use for LedgerStream.
const (
	Bucket       = "rekey"
	LedgerStream = "KV_rekey"
	EventStream  = "REKEY_EVENTS"
	AuditStream  = "REKEY_AUDIT"
	WorkStream   = "REKEY_WORK"
	AckStream    = "REKEY_ACKS"
)

// The subjects of the ledger's stream, below the KV prefix.
const (
	kv             = "$KV." + Bucket + "."
	recordPrefix   = kv + "record."
	targetPrefix   = kv + "target."
	incidentPrefix = kv + "incident."
	eventPrefix    = kv + "event."
	auditPrefix    = kv + "audit."
	schedulePrefix = kv + "schedule."
	duePrefix      = kv + "due."
	controlSubject = kv + "control"
	metaSubject    = kv + "meta.ledger"
	probeSubject   = kv + "meta.probe"
)

// The subjects of the other streams; the events' are in package events.
const (
	auditOutPrefix = "rekey.audit."
	ackPrefix      = "rekey.ack."
	rekeyPrefix    = "rekey."
)

func recordSubject(id credential.ID) string   { return recordPrefix + id.Token() }
func scheduleSubject(id credential.ID) string { return schedulePrefix + id.Token() }
func dueSubject(id credential.ID) string      { return duePrefix + id.Token() }

func auditSubject(id credential.ID, rev uint64) string {
	return auditPrefix + id.Token() + "." + strconv.FormatUint(rev, 10)
}

func eventSubject(eventType string, id credential.ID, rev uint64) string {
	return eventPrefix + events.Short(eventType) + "." + id.Token() + "." + strconv.FormatUint(rev, 10)
}

func laneSubject(lane credential.Lane, target string, id credential.ID) string {
	return rekeyPrefix + string(lane) + "." + target + "." + id.Token()
}

func laneFilter(lane credential.Lane, target string) string {
	return rekeyPrefix + string(lane) + "." + target + ".>"
}

func laneConsumer(lane credential.Lane, target string) string { return string(lane) + "=" + target }

// idFrom reads the id that follows prefix in subject.
func idFrom(prefix, subject string) (credential.ID, error) {
	rest, ok := strings.CutPrefix(subject, prefix)
	if !ok {
		return "", fmt.Errorf("subject %q does not begin with %q", subject, prefix)
	}
	return credential.ParseID(strings.Replace(rest, ".", "/", 1))
}
