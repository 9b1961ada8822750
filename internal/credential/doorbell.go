package credential

// Lane is one of the two queues of a target. The revoke lane never waits behind rotations.
type Lane string

// The lanes.
const (
	LaneWork   Lane = "work"
	LaneRevoke Lane = "revoke"
)

// Lanes lists every lane.
func Lanes() []Lane { return []Lane{LaneRevoke, LaneWork} }

// Doorbell says that a record may want work. It may be lost, late or repeated: the record is the truth.
type Doorbell struct {
	Lane   Lane
	Target string
	ID     ID
	// Rev is the record's when it was rung, for logs only.
	Rev uint64
	// Delivery counts the deliveries of this doorbell, from 1.
	Delivery uint64
}
