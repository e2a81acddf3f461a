import numpy as np
import pytest

from planner.small_problems import cheapest_by_trying, small_problem
from waterline.planner.milp import choose
