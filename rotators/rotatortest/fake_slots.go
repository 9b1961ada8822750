package rotatortest

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/rotators"
)

// SlotsConfig describes a fake issuer whose slots are used again, like the roles of a database. The zero value has two slots
// and a fence.
type SlotsConfig struct {
	// Credential is whose fence counts as ours.
	Credential string
	// Slots are the names that versions take in turn; one makes the in-place plan. "a" and "b" if empty.
	Slots []rotators.VersionID
	// Adopted is a slot that may be changed although it carries no fence.
	Adopted rotators.VersionID
	// Unfenced issuers hold no fence: the last writer wins.
	Unfenced bool
	// Settle is how long a new secret is refused at first.
	Settle time.Duration
	// KeepsSessions means that Disable does not end sessions.
	KeepsSessions bool
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// FakeSlots is an issuer in memory together with its rotator. The engine chooses the secrets. It is safe for concurrent use
// and inside a testing/synctest bubble.
type FakeSlots struct {
	Wire
	cfg SlotsConfig

	mu    sync.Mutex
	slots map[rotators.VersionID]*fakeSlot
}

// fakeSlot is one slot that exists. Its fence is the op that last changed it, and how far that went.
type fakeSlot struct {
	secret   string // empty: removed
	enabled  bool
	since    time.Time // of the secret
	fence    rotators.Op
	fenced   bool
	stage    int // of the fence: applied, disabled, deleted
	created  time.Time
	used     time.Time
	sessions []*FakeSession
}

const (
	stageApplied = iota
	stageDisabled
	stageDeleted
)

var (
	_ rotators.Rotator  = (*FakeSlots)(nil)
	_ rotators.Composer = (*FakeSlots)(nil)
	_ rotators.Checker  = (*FakeSlots)(nil)
)

// NewFakeSlots makes an issuer whose slots do not exist yet.
func NewFakeSlots(cfg SlotsConfig) *FakeSlots {
	if len(cfg.Slots) == 0 {
		cfg.Slots = []rotators.VersionID{"a", "b"}
	}
	cfg.Now = clock(cfg.Now)
	return &FakeSlots{cfg: cfg, slots: map[rotators.VersionID]*fakeSlot{}}
}

// Traits follow the configuration.
func (f *FakeSlots) Traits() rotators.Traits {
	return rotators.Traits{
		MaxLive: len(f.cfg.Slots), Countable: true, Kills: !f.cfg.KeepsSessions, Unfenced: f.cfg.Unfenced, Settle: f.cfg.Settle,
	}
}

// Compose names the first slot that is not in use; a single one always. The fields are username and password.
func (f *FakeSlots) Compose(op rotators.Op, inUse []rotators.VersionID, random io.Reader) (rotators.VersionID, rotators.Material, error) {
	step := fmt.Sprintf("compose generation %d", op.Generation)
	free := slices.IndexFunc(f.cfg.Slots, func(id rotators.VersionID) bool { return len(f.cfg.Slots) == 1 || !slices.Contains(inUse, id) })
	if free < 0 {
		return "", rotators.Material{}, rotators.Faultf(rotators.Refused, step, "every slot is in use: %v", inUse)
	}
	raw := make([]byte, 20)
	if _, err := io.ReadFull(random, raw); err != nil {
		return "", rotators.Material{}, rotators.Faultf(rotators.Transient, step, "draw a password: %w", err)
	}
	id := f.cfg.Slots[free]
	return id, rotators.Text(map[string]string{rotators.FieldUsername: string(id), rotators.FieldPassword: "pw-" + hex.EncodeToString(raw)}), nil
}

// Apply gives the slot that m names m's password.
func (f *FakeSlots) Apply(ctx context.Context, op rotators.Op, m rotators.Material) (rotators.Version, error) {
	c := Call{Apply, op, rotators.VersionID(m.Reveal(rotators.FieldUsername))}
	return rotators.Version{ID: c.ID}, f.change(ctx, c, stageApplied, func(s *fakeSlot) {
		if secret := string(m.Reveal(rotators.FieldPassword)); s.secret != secret {
			s.secret, s.since = secret, f.cfg.Now()
			f.end(s)
		}
		s.enabled = true
	})
}

// Disable refuses logins and ends sessions, unless the configuration keeps them.
func (f *FakeSlots) Disable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return f.change(ctx, Call{Disable, op, id}, stageDisabled, func(s *fakeSlot) { s.enabled = false; f.end(s) })
}

// Enable lets the slot's secret log in again.
func (f *FakeSlots) Enable(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return f.change(ctx, Call{Enable, op, id}, stageApplied, func(s *fakeSlot) { s.enabled = true })
}

// Delete empties the slot, which stays with its fence.
func (f *FakeSlots) Delete(ctx context.Context, op rotators.Op, id rotators.VersionID) error {
	return f.change(ctx, Call{Delete, op, id}, stageDeleted, func(s *fakeSlot) { s.enabled, s.secret = false, ""; f.end(s) })
}

func (f *FakeSlots) end(s *fakeSlot) {
	if f.cfg.KeepsSessions {
		return
	}
	for _, open := range s.sessions {
		open.Close()
	}
	s.sessions = nil
}

func (f *FakeSlots) change(ctx context.Context, c Call, stage int, do func(*fakeSlot)) error {
	if err := f.send(ctx, c); err != nil {
		return err
	}
	return f.reply(ctx, c, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if !slices.Contains(f.cfg.Slots, c.ID) {
			return rotators.Faultf(rotators.Refused, c.step(), "it is not one of the slots %v", f.cfg.Slots)
		}
		if fault := f.refuses(c); fault != nil {
			return fault
		}
		s := f.slots[c.ID]
		if s == nil {
			if c.Method != Apply {
				return nil
			}
			s = &fakeSlot{created: f.cfg.Now()}
			f.slots[c.ID] = s
		}
		if s.fenced && s.stage == stageDeleted && c.Method == Disable {
			stage = stageDeleted // it stays empty
		}
		do(s)
		s.fence, s.fenced, s.stage = c.Op, !f.cfg.Unfenced, stage
		return nil
	}())
}

// refuses is the fence. Bringing to life is refused if any slot has met a newer op; putting to death asks its own.
func (f *FakeSlots) refuses(c Call) *rotators.Fault {
	s := f.slots[c.ID]
	revives := c.Method == Apply || c.Method == Enable
	newer := func(s *fakeSlot) bool { return s.fenced && s.fence.Newer(c.Op.Epoch, c.Op.Generation) }
	for id, other := range f.slots {
		if newer(other) && (id == c.ID || revives) {
			return rotators.Faultf(rotators.Conflict, c.step(), "slot %q carries epoch %d generation %d", id, other.fence.Epoch, other.fence.Generation)
		}
	}
	if s == nil {
		if c.Method == Enable {
			return rotators.Faultf(rotators.Refused, c.step(), "the slot does not exist")
		}
		return nil
	}
	same := s.fenced && s.fence.Epoch == c.Op.Epoch && s.fence.Generation == c.Op.Generation
	switch {
	case s.fenced && s.fence.Credential != c.Op.Credential:
		return rotators.Faultf(rotators.Refused, c.step(), "the slot belongs to another credential")
	case !s.fenced && !f.cfg.Unfenced && s.enabled && c.ID != f.cfg.Adopted:
		return rotators.Faultf(rotators.Refused, c.step(), "the slot is in use and was not made by us")
	case same && (s.fence.ID != c.Op.ID || revives && s.stage != stageApplied):
		return rotators.Faultf(rotators.Conflict, c.step(), "the slot was written by op %s already", s.fence.ID)
	case c.Method == Enable && s.secret == "":
		return rotators.Faultf(rotators.Refused, c.step(), "the slot's secret was removed")
	}
	return nil
}

// Prove accepts the secret of an enabled slot, once it has settled.
func (f *FakeSlots) Prove(ctx context.Context, op rotators.Op, id rotators.VersionID, m rotators.Material) (rotators.Verdict, error) {
	c := Call{Prove, op, id}
	if err := f.send(ctx, c); err != nil {
		return rotators.Unknown, err
	}
	verdict := rotators.Rejected
	if string(m.Reveal(rotators.FieldUsername)) == string(id) && f.login(m) != nil {
		verdict = rotators.Accepted
	}
	if err := f.reply(ctx, c, nil); err != nil {
		return rotators.Unknown, err
	}
	return verdict, nil
}

func (f *FakeSlots) login(m rotators.Material) *fakeSlot {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, secret := f.slots[rotators.VersionID(m.Reveal(rotators.FieldUsername))], string(m.Reveal(rotators.FieldPassword))
	if s == nil || !s.enabled || secret == "" || s.secret != secret || f.cfg.Now().Before(s.since.Add(f.cfg.Settle)) {
		return nil
	}
	s.used = f.cfg.Now()
	return s
}

// Open logs in as a consumer. It fails if the issuer refuses.
func (f *FakeSlots) Open(_ context.Context, m rotators.Material) (Session, error) {
	s := f.login(m)
	if s == nil {
		return nil, fmt.Errorf("login as %s: refused", m.Reveal(rotators.FieldUsername))
	}
	open := &FakeSession{}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.sessions = append(s.sessions, open)
	return open, nil
}

// Inspect is the census over the wire.
func (f *FakeSlots) Inspect(ctx context.Context) ([]rotators.VersionInfo, error) {
	c := Call{Method: Inspect}
	if err := f.send(ctx, c); err != nil {
		return nil, err
	}
	infos := f.Census()
	if err := f.reply(ctx, c, nil); err != nil {
		return nil, err
	}
	return infos, nil
}

// Census is the same without the wire: the truth, for an oracle.
func (f *FakeSlots) Census() []rotators.VersionInfo {
	f.mu.Lock()
	defer f.mu.Unlock()
	infos := []rotators.VersionInfo{}
	for _, id := range f.cfg.Slots {
		s := f.slots[id]
		if s == nil {
			continue
		}
		i := rotators.VersionInfo{ID: id, Enabled: s.enabled, CreatedAt: s.created, LastUsedAt: s.used}
		for _, open := range s.sessions {
			if open.Alive() {
				i.Sessions++
			}
		}
		if s.fenced && s.fence.Credential == f.cfg.Credential && s.fence.ID != uuid.Nil {
			i.Ours, i.Generation, i.Epoch, i.OpID = true, s.fence.Generation, s.fence.Epoch, s.fence.ID
		}
		infos = append(infos, i)
	}
	return infos
}

// Put makes a slot as somebody else would have: enabled, with a secret, without a fence.
func (f *FakeSlots) Put(id rotators.VersionID, password string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.slots[id] = &fakeSlot{secret: password, enabled: true, created: f.cfg.Now(), since: f.cfg.Now().Add(-f.cfg.Settle)}
}

// Check finds nothing on a wire that works.
func (f *FakeSlots) Check(ctx context.Context) ([]rotators.Finding, error) {
	return nil, f.send(ctx, Call{Method: Inspect})
}

// Close does nothing.
func (f *FakeSlots) Close() error { return nil }
